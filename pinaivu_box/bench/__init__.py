"""A load generator for any OpenAI-compatible chat-completions URL; all requests stream.

    workload   what is sent: lengths, prompts, arrivals; pure, the same for every server
    wire       parsers of HTTP/1.1 and server-sent events
    target     a URL with its key, model and additional fields; the requests before a run
    client     one streamed request, and the times of what happened
    run        many requests: closed or open loop, tenants, an intruder
    statistics percentiles, Jain's index, the summary of a run
    compare    two servers, run alternately, and their ratios
    report     summaries as JSON and as rows of a table
    plot       the distributions as an SVG

Times are seconds of the monotonic clock; reports are in milliseconds.
"""
