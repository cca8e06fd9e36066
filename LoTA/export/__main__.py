"""Writes a merged model in a format that other engines open: folder in, folder out.

    python -m LoTA.export MERGED --format gguf --output DIR --verify

MERGED is a merged folder, or an adapter folder, which is merged first. A LoRA adapter can only become dense. Formats:
"""
import argparse
import textwrap

from LoTA import run_script
from LoTA.export import FORMATS

DTYPES = ("bfloat16", "float16", "float32")


def main() -> None:
    formats = "\n".join(textwrap.fill(f"{name:<8}{entry.summary}", 118, subsequent_indent=" " * 8)
                        for name, entry in FORMATS.items())
    parser = argparse.ArgumentParser(prog="python -m LoTA.export", description=f"{__doc__}\n{formats}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MERGED", help="a merged folder, or an adapter folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="one of the formats above")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--gptq", help="the GPTQ model of an adapter [the one that the adapter names]")
    parser.add_argument("--dtype", choices=DTYPES, help="the dtype of --format dense [the model's own]")
    parser.add_argument("--results", help="a results file of --ft_dataset_name, to be quoted in the model card")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare it, tensor by tensor")
    args = parser.parse_args()
    import torch

    from LoTA.export.run import export
    from LoTA.storage import read_json
    evaluation = read_json(args.results) if args.results else None
    export(args.source, args.format, args.output, getattr(torch, args.dtype) if args.dtype else None, evaluation,
           args.verify, args.gptq)
    print(f"exported{' and verified' if args.verify else ''}: {args.output}")


def cli() -> None:
    """The console command lota-export."""
    run_script(main)


if __name__ == "__main__":
    cli()
