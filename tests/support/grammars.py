"""GrammarCompiler that are expensive to compile."""

from __future__ import annotations


def chain(rules: int) -> str:
    """GBNF in which each rule leads to the next: converted in a time that grows with the square of
    them.  2,400 are as many as a request may have, and take ten seconds or so."""
    named = "\n".join(f"r{n}::={'.' * 12}r{n + 1}" for n in range(rules))
    return f'root ::= r0\n{named}\nr{rules} ::= "x"'
