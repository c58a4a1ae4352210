"""The bundled world: a small coloured maze, its simulator, training recipe and metrics."""
