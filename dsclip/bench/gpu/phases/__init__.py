"""One file a phase, each with `measure(settings) -> Iterator[Row | Facts]`: what is yielded is kept, whatever comes after."""
