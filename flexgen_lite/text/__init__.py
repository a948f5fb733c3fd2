"""Values as text: in messages, as sizes, as lines of JSON."""
