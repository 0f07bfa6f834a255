"""Updates of the executable: what the page of releases offers, and putting it in place."""
