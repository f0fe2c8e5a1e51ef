"""The command line of the benchmarks of low rank."""

from __future__ import annotations

import argparse

from benchmarks.low_rank import __doc__ as text


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("what", choices=("minilm", "crepe", "speed", "memory"))
    parser.add_argument("--sizes", default="768x1,768x3,768x12", help="WIDTHxBLOCKS of speed, with commas")
    parser.add_argument("--peer-blocks", type=int, default=None, help="of speed: blocks that the peer is timed on")
    parser.add_argument("--ratio", type=float, default=0.25, help="of speed")
    parser.add_argument("--ratios", default="0.7,0.5,0.3", help="of the others, with commas")
    parser.add_argument("--forms", default=None, help="of minilm: only these, with semicolons")
    given = parser.parse_args()
    ratios = tuple(float(item) for item in given.ratios.split(","))
    if given.what == "speed":
        from benchmarks.low_rank.speed import speed

        pairs = [item.split("x") for item in given.sizes.split(",")]
        speed([(int(width), int(blocks)) for width, blocks in pairs], given.ratio, given.peer_blocks)
    elif given.what == "memory":
        from benchmarks.low_rank.memory import memory

        memory(sorted({int(item.split("x")[0]) for item in given.sizes.split(",")}))
    elif given.what == "crepe":
        from benchmarks.low_rank.crepe import crepe

        crepe(ratios)
    else:
        from benchmarks.low_rank.minilm import minilm

        minilm(ratios, given.forms.split(";") if given.forms else None)


if __name__ == "__main__":
    main()
