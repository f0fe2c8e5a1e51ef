"""Training for the passes that train: one loop, resumable, on one device or several processes.

How a pass trains::

    @dataclass(frozen=True)
    class MyPass(TrainingOptions, Pass):                 # options: epochs, lr, schedule, checkpoint, ...
        loader: Iterable[Any]                            # required options of its own come first
        def run(self, graph_module, context):
            history = train(graph_module, self.loader, Objective(self.loss), self,
                            hooks=(MyHook(),), progress=context.progress)
            return PassResult(graph_module, (Rewrite("all", "trained", history.detail()),), (), history.summary())

`loop.train` is the loop; `options.TrainingOptions` its options; `objective.Objective` what is minimised (its own
parameters train too); `hooks.Hook` acts at every step (masks held, observers frozen), adds groups of parameters
(learned scales), and has a state in the checkpoint; `history.History` is the account.
"""
