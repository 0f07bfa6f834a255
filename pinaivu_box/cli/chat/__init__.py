"""Chats in the terminal (`pinaivu run`)."""
