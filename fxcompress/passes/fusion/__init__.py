"""The rules of :class:`~fxcompress.passes.fuse_modules.FuseModules`, one file each: maths, legality, rewrite."""
