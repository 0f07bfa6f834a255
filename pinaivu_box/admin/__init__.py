"""What endpoints and commands both show of accounts, keys, usage and the audit trail.

It takes a database and gives views; it knows neither HTTP nor the command line.
"""
