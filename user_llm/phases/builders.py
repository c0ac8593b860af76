"""What a phase of a run does: `config[phase].task` names one of BUILDERS, which are (phase, run, data) -> Task."""

from user_llm.phases import contextualize, pretrain_encoder, pretrain_lm

BUILDERS = {
    "pretrain_lm": pretrain_lm.build,
    "pretrain_encoder": pretrain_encoder.build,
    "contextualize": contextualize.build,
}
