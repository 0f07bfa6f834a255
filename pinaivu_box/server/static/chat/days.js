// Conversations by day.

const DAY = 86400000;

/** The heading under which a time belongs in a list, newest first. */
export function dayOf(milliseconds, now = new Date()) {
  const midnight = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime();
  if (milliseconds >= midnight) return "Today";
  if (milliseconds >= midnight - DAY) return "Yesterday";
  if (milliseconds >= midnight - 7 * DAY) return "Last 7 days";
  if (milliseconds >= midnight - 30 * DAY) return "Last 30 days";
  const options = { month: "long", year: "numeric" };
  return new Date(milliseconds).toLocaleDateString(undefined, options);
}
