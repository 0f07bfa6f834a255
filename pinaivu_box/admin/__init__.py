"""Operations on accounts, keys, usage and the audit trail, for the endpoints and the commands.

They take a database and give views; they know neither HTTP nor the command line.
"""
