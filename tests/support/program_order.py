"""The order in which the interpreter runs the programs of a launch."""


class Backwards:
    """Launches in the interpreter whose programs run from the last to the first."""

    def __init__(self, launch, monkeypatch):
        self.launch, self.monkeypatch, self.num_launches = launch, monkeypatch, 0

    def __call__(self, grid, **arguments):
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        forwards = builder.set_grid_idx

        def set_grid_idx(x, y, z):
            sizes = (*grid, 1, 1)[:3]
            forwards(*(size - 1 - i for size, i in zip(sizes, (x, y, z), strict=True)))

        self.monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
        self.num_launches += 1
        self.launch(grid, **arguments)
