"""What `llm.quantize` changes of an open LLM: its next tokens on general text, beside the LLM as its checkpoint holds it.

    python launch/benchmark_quantize.py --llm=DIR [--windows=8] [--out=quantize.json]

The text is the one that forgetting is measured on (`general_text`), in windows of 128 tokens, computed in float32. Prints one JSON object
with a line for each form of the layers: `bytes` of a weight in them, scales included; `kl`, the mean over positions of KL(as it came || quantised) in
nats; `same`, the share of positions whose likeliest token is the same; and `perplexity`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
FORMS = ("", "int8", "int4", "nf4")


def log_probabilities(llm: str, form: str, tokens) -> tuple:
    """Return the log-probabilities of the next token at each position, [B, T, V], and the bytes of a weight of the layers."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from user_llm.common import trees
    from user_llm.models.decoder import Decoder
    from user_llm.models.pretrained import decoder_config, load_decoder
    from user_llm.models.user import hidden_states

    plain = decoder_config(llm)
    config = dataclasses.replace(plain, block=dataclasses.replace(plain.block, quantize=form))
    graphdef, shapes = trees.abstract(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    params = load_decoder(llm, config)

    @jax.jit
    def run(params, rows):
        decoder = trees.merge(graphdef, params)
        hidden = hidden_states(decoder, rows, jnp.full(len(rows), rows.shape[1]))
        return jax.nn.log_softmax(decoder.logits(hidden))

    weights = trees.count(trees.abstract(lambda: Decoder(plain, rngs=nnx.Rngs(params=0)))[1]["stack"])
    size = sum(
        leaf.size * (2 if leaf.dtype == jnp.float32 else leaf.dtype.itemsize) for leaf in jax.tree.leaves(shapes["stack"])
    )
    return [run(params, row[None])[0] for row in tokens], size / weights


def main() -> None:
    """Compare all forms with the checkpoint's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="a directory in Hugging Face layout")
    parser.add_argument("--windows", type=int, default=8, help="of 128 tokens")
    parser.add_argument("--out", type=pathlib.Path, help="where the result goes besides")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    import jax.numpy as jnp

    from user_llm.data.tokenizer import load_tokenizer
    from user_llm.phases.general_text import read_windows

    batch = read_windows(load_tokenizer(pathlib.Path(args.llm)), file="", windows=args.windows, window=128)
    came, found = None, {}
    for form in FORMS:
        logs, size = log_probabilities(args.llm, form, batch["tokens"])
        came = logs if came is None else came
        pairs = list(zip(came, logs, strict=True))
        mean = lambda values: float(jnp.mean(jnp.stack(list(values))))  # noqa: E731
        picked = mean(jnp.take_along_axis(log, ids[:, None], 1).mean() for log, ids in zip(logs, batch["next"], strict=True))
        found[form or "as it came"] = {
            "bytes": size,
            "kl": mean((jnp.exp(a) * (a - b)).sum(-1).mean() for a, b in pairs),
            "same": mean((a.argmax(-1) == b.argmax(-1)).mean() for a, b in pairs),
            "perplexity": float(jnp.exp(-picked)),
        }
    found = {"windows": len(batch["tokens"]), "forms": found}
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
