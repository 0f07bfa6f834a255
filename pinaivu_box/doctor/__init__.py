"""The checks of `pinaivu doctor` and `pinaivu peers doctor`.  None of them changes a home."""
