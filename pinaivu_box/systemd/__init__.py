"""A box as a service of systemd: what it tells the service manager and the journal, its unit, and
how that is installed."""
