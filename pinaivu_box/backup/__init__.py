"""Backups of a home: one file, made while the box may be running, and restored completely or not.

The file is a tar archive, which `tar tvf` lists, with these members in this order:

    manifest.json     format, version, schema, node_id, created; name, size and SHA-256 of each part
    manifest.sha256   the manifest's own, as `sha256sum` writes it
    identity.key      without it the restored box would be another node
    config.toml       if the home has one
    aliases.json      if aliases of models were made
    model_settings.json  if settings of models were set
    pinaivu.db        a snapshot by SQLite's online backup

Every header is exactly what `archive` would write for that name and size, and the archive ends
with two zero blocks and nothing more.  So a reader compares instead of interpreting: no path,
link, mode or extension of a hostile archive has an effect, and every byte of the file is checked.
Model files are not included.

Encrypted (`sealed`), that archive is cut into chunks of 64 KiB:

    17 bytes   "pinaivu-sealed/1\\n"
    16         salt                                       \\
     8         Argon2id's opslimit, little-endian          |  of the key: Argon2id(passphrase)
     8         Argon2id's memlimit in bytes, little-endian /
    24         header of libsodium's secretstream (XChaCha20-Poly1305)
    then       chunks, each 17 bytes longer than its text; the last has the tag FINAL

The first 49 bytes are authenticated with every chunk.  Chunks cannot be changed, removed, repeated
or reordered without detection, and a truncated file lacks the FINAL one.
"""
