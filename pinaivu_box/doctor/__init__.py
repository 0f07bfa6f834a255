"""What `pinaivu doctor` looks at.  Nothing here changes a home, whatever state it is in."""
