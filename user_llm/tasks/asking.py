"""From a phase's config to the prompts of its tasks."""

from collections.abc import Callable

from ml_collections import ConfigDict

from user_llm.common.errors import naming
from user_llm.data.pipeline import ExampleConfig
from user_llm.data.prompts.base import Examples, Lines, Question
from user_llm.data.prompts.favorite import FavoriteExamples, Labels, OfFuture, OfHistory
from user_llm.data.prompts.next_item import NextItem, NextItemExamples
from user_llm.data.prompts.review import ReviewExamples
from user_llm.evals.counting import favorite_baselines
from user_llm.evals.popularity import popularity_ranks, recent_popularity_ranks
from user_llm.tasks.context import Context

# Each from (lines, context, the task's template).
TASKS: dict[str, Callable[..., Examples]] = {
    "next_item": lambda lines, context, template: NextItemExamples(
        NextItem(lines, **template), context.timelines, context.split
    ),
    "favorite": lambda lines, context, template: FavoriteExamples(Question(lines, **template), favorites(context, "favorite")),
    "favorite_future": lambda lines, context, template: FavoriteExamples(
        Question(lines, **template), favorites(context, "favorite_future")
    ),
    "review": lambda lines, context, template: review(lines, context, **template),
}


FAVORITES = {"favorite": OfHistory, "favorite_future": OfFuture}


def favorites(context: Context, task: str) -> OfHistory:
    """Return what the favourite is of, and among which classes.

    Raises:
      ValueError: items without classes.
    """
    return FAVORITES[task](Labels(context.timelines, **context.config.labels), context.split)


def review(lines: Lines, context: Context, *, column: str, **template) -> ReviewExamples:
    """Return what users wrote in a column of texts."""
    return ReviewExamples(Question(lines, **template), context.timelines, context.split, column=column)


def baseline_rows(context: Context) -> list[dict]:
    """Return the result rows of what needs no model: of the next item popularity, of all time and of 7 days, of favourites counting and the majority class."""
    ranks = popularity_ranks(context.timelines, context.split, "test")
    rows = context.record("baselines", "next_item", "popularity", ranks.measured())
    if "timestamp" in context.timelines.columns:
        recent = recent_popularity_ranks(context.timelines, context.split, "test", days=7)
        rows += context.record("baselines", "next_item", "popularity_7d", recent.measured())
    config = context.config
    asked = {task for name in config.phases if "prompts" in config[name] for task in asked_tasks(config[name])}
    for task in FAVORITES:
        if task in asked:
            for method, measured in favorite_baselines(favorites(context, task)).items():
                rows += context.record("baselines", task, method, measured)
    return rows


def asked_tasks(phase: ConfigDict) -> list[str]:
    """Return the tasks of a phase, the one that it monitors first."""
    return [task for task in TASKS if phase.prompts[task].weight]


def build_examples(phase: ConfigDict, context: Context, examples: ExampleConfig) -> dict[str, Examples]:
    """Return the examples of each task of a phase.

    Raises:
      ValueError: a task that this dataset has not what it takes for, or a template that does not fit.
    """
    lines = Lines(
        context.tokenizer(), context.timelines.catalogue, max_title_tokens=phase.prompts.max_title_tokens,
        history=examples.history, text_items=examples.text_items,
    )  # fmt: skip
    template = lambda task: {key: value for key, value in phase.prompts[task].items() if key not in ("weight", "text")}  # noqa: E731
    found = {}
    for task in asked_tasks(phase):
        with naming(f"prompts.{task}"):
            found[task] = TASKS[task](lines, context, template(task))
    return found
