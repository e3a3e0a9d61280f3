"""Shared by all scripts: one-line errors, the command line, the tokenizer, the token files."""

import argparse
import base64
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent
VOCABULARY = DATA / "stories.tiktoken"  # made by: python data/stories.py vocabulary
PATTERN = r" ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+"  # words, numbers, punctuation, each with the space before it
END = "<|endoftext|>"
MAX_VOCAB = 2**16  # tokens are stored as uint16


class InputError(ValueError):
    """Wrong user input. The message says what is wrong and how to fix it."""


class Parser(argparse.ArgumentParser):
    """Raises InputError for a wrong command line, and allows no abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def run(main):
    """Run a script's main(). Wrong input ends in one line and exit status 2, a failing machine in one line and 1.
    Anything else is a bug and shows a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        main()
        return sys.stdout.flush()  # here, so that a closed pipe is noticed in time
    except InputError as error:
        status, message = 2, str(error)
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except (OSError, FloatingPointError) as error:
        status, message = 1, str(error)
    except (MemoryError, RuntimeError) as error:
        out_of_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
        if not isinstance(error, (MemoryError, out_of_memory)) and "DefaultCPUAllocator: " not in str(error):
            raise  # a bug. (On a CPU without free memory, PyTorch raises a plain RuntimeError)
        status, message = 1, f"not enough memory; choose a smaller size, batch or context ({str(error)[:150]})"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    (os._exit if "RANK" in os.environ else sys.exit)(status)  # threads of torch.distributed can abort an orderly exit


def wrap(text):
    """Text in lines of 80 columns, broken between words."""
    return "\n".join(textwrap.fill(line, 80, break_on_hyphens=False) for line in text.split("\n"))


def check_device(device):
    """Raise InputError if this machine has no such device."""
    import torch  # here, because making data needs no torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device={device}: not available: {str(error).splitlines()[0]}") from error


def fast_bfloat16(device):
    """Does this device multiply matrices faster in bfloat16 than in float32?"""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of PyTorch
    return device == "cpu" and bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def load_tokenizer(name):
    """A tiktoken.Encoding: "stories", which ships with this file, or one of tiktoken's own, such as "gpt2".

    tiktoken downloads each of its own once. Raises InputError for an unknown name or more than 65,536 tokens."""
    import tiktoken  # here, because `import model` needs no tokenizer

    if name == "stories":
        lines = map(str.split, VOCABULARY.read_text(encoding="ascii").splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    if name not in tiktoken.list_encoding_names():
        raise InputError(f"tokenizer {name!r}: must be stories, gpt2, or another of tiktoken's")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise OSError(f"the {name} tokenizer could not be downloaded; go online, or use --tokenizer=stories") from error
    if encoding.n_vocab > MAX_VOCAB:
        raise InputError(f"tokenizer {name!r}: has {encoding.n_vocab:,} tokens; at most {MAX_VOCAB:,} fit in uint16")
    return encoding


def load_data(name):
    """Load a data set of data/prepare.py, by its name in data/ or its path. Return meta (a dict), train and val
    (uint16, memory-mapped). Raises InputError if something is missing, truncated or inconsistent."""
    folder = DATA / name if (DATA / name / "meta.json").exists() else Path(name)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such data folder; make one with data/prepare.py")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in ("train", "val")}
        for split, tokens in splits.items():
            expected = meta[f"{split}_tokens"] + 1, meta[f"{split}_stories"] + 1
            if (len(tokens), np.count_nonzero(tokens == meta["end"])) != expected or tokens.max() >= meta["vocab_size"]:
                raise ValueError(f"{split}.bin and meta.json do not fit together")
        if meta["val_bytes"] < 1 or (meta["val_nats"] and len(meta["val_nats"]) != meta["val_stories"]):
            raise ValueError("meta.json contradicts itself")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: damaged or of an older version ({error}); make it again with data/prepare.py"
        ) from error
    return meta, *splits.values()


def read_txt(path):
    """Yield the texts between <|endoftext|>, or between blank lines if the file has none, reading line by line."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        has_end = any(END.encode() in line for line in file)
        file.seek(0)
        lines = []
        for number, line in enumerate(file, 1):
            try:
                line = line.decode("utf-8-sig").replace("\r\n", "\n")  # -sig removes a byte-order mark
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: line {number} is not UTF-8 ({error.reason})") from error
            *ended, rest = line.split(END) if has_end else [line] if line.strip() else ["", ""]  # a blank line ends one
            for text in ended:
                yield "".join([*lines, text]).strip()
                lines = []
            lines.append(rest)
    yield "".join(lines).strip()
