"""How worlds run fast and reach people: executors, hand-over between threads, sinks."""
