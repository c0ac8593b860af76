"""Published figures, by (dataset, task). All test on each user's last event.

They are printed beside results on the same dataset alone: no figure of a large set ever stands beside results on a small one.
"""

from typing import Any

SPLIT = "leave_last_out"
_RANKED = ("method", "recall@5", "recall@10", "ndcg@10", "remark", "source")
_NAMED = ("method", "accuracy", "remark", "source")
_WRITTEN = ("method", "ROUGE", "remark", "source")

_TABLE_4 = "SeqLLM, arXiv 2608.03063, table 4"
_SEQLLM = ("candidates restricted, origin of baselines unclear", _TABLE_4)
_COUNTED = ("the label is counted in what the model sees; origin of baselines unclear", _TABLE_4)
_SUMMARY = ("of the review's summary line; which ROUGE is not said; origin of baselines unclear", _TABLE_4)
_HSTU = "README of github.com/meta-recsys/generative-recommenders"
_ESASREC = "README of github.com/blondered/transformer_benchmark"
_PLUS = f"arXiv 2309.07602 by the {_ESASREC}"
_GSASREC = f"arXiv 2308.07192 by the {_ESASREC}"

# (header, rows)
PUBLISHED: dict[tuple[str, str], tuple[tuple[str, ...], list[tuple[Any, ...]]]] = {
    ("ml-20m", "next_item"): (
        _RANKED,
        [
            ("sequence model alone", 0.152, "", "", *_SEQLLM),
            ("history as text", 0.140, "", "", *_SEQLLM),
            ("User-LLM", 0.154, "", "", *_SEQLLM),
            ("SeqLLM (8B)", 0.174, "", "", *_SEQLLM),
            ("SASRec, full cross-entropy", "", 0.2983, "", "", _PLUS),
            ("SASRec, sampled softmax", "", 0.2889, 0.1621, "", _HSTU),
            ("BERT4Rec", "", 0.2816, 0.1703, "", _HSTU),
            ("eSASRec", "", 0.3289, 0.1966, "", _ESASREC),
            ("HSTU", "", 0.3273, 0.1895, "", _HSTU),
            ("HSTU-large", "", 0.3556, 0.2098, "", _HSTU),
        ],
    ),
    ("ml-20m", "favorite"): (
        _NAMED,
        [
            ("sequence model alone", 0.372, *_COUNTED),
            ("history as text", 0.787, *_COUNTED),
            ("User-LLM", 0.787, *_COUNTED),
            ("SeqLLM (8B)", 0.973, *_COUNTED),
        ],
    ),
    ("ml-1m", "next_item"): (
        _RANKED,
        [
            ("SASRec, full cross-entropy", "", 0.3152, "", "", _PLUS),
            ("SASRec, sampled softmax", "", 0.2853, 0.1603, "", _HSTU),
            ("BERT4Rec", "", 0.2843, 0.1537, "", _HSTU),
            ("gSASRec", "", 0.3000, "", "history removed (`unseen`)", _GSASREC),
            ("eSASRec", "", 0.3133, 0.1772, "", _ESASREC),
            ("HSTU", "", 0.3097, 0.1720, "", _HSTU),
            ("HSTU-large", "", 0.3294, 0.1893, "", _HSTU),
        ],
    ),
    ("amazon-Movies_and_TV", "next_item"): (
        _RANKED,
        [
            ("sequence model alone", 0.050, "", "", *_SEQLLM),
            ("history as text", 0.042, "", "", *_SEQLLM),
            ("User-LLM", 0.047, "", "", *_SEQLLM),
            ("SeqLLM (8B)", 0.062, "", "", *_SEQLLM),
        ],
    ),
    ("amazon-Movies_and_TV", "favorite"): (
        _NAMED,
        [
            ("sequence model alone", 0.437, *_COUNTED),
            ("history as text", 0.885, *_COUNTED),
            ("User-LLM", 0.890, *_COUNTED),
            ("SeqLLM (8B)", 0.987, *_COUNTED),
        ],
    ),
    ("amazon-Movies_and_TV", "review"): (
        _WRITTEN,
        [
            ("history as text", 22.82, *_SUMMARY),
            ("User-LLM", 26.38, *_SUMMARY),
            ("SeqLLM (8B)", 28.62, *_SUMMARY),
        ],
    ),
}
