"""A load generator for any OpenAI-compatible chat-completions URL, always streaming.

    workload   what is sent: lengths, prompts, arrivals; pure, the same for every server
    wire       HTTP/1.1 and server-sent events out of whatever bytes arrive
    target     one URL with its key, model and extra fields; what is asked of it beforehand
    client     one streamed request -> what happened when
    run        many requests: closed or open loop, tenants, an intruder
    statistics percentiles, Jain's index, one run's summary
    compare    two servers, run by run in turn, and their ratios
    report     summaries as table rows
    plot       the distributions as an SVG

Times inside are seconds of the monotonic clock; reports are in milliseconds.
"""
