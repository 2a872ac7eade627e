"""Training gates and weights with Hugging Face trainers; data; checkpoints that resume bit for bit."""

from ppnet.train.callback import PuppetCallback
from ppnet.train.checkpointing import last_good_checkpoint, verify_checkpoint
from ppnet.train.data import TextBlocks, check_vocabulary, text_blocks
from ppnet.train.distill import Distillation, DistillationMixin, DistillationTrainer
from ppnet.train.grpo import RewardMovementMixin
from ppnet.train.healing import heal
from ppnet.train.movement import MovementCallback
from ppnet.train.objective import distillation_loss, param_groups
from ppnet.train.reference import kl_reference
from ppnet.train.trainer import PuppetTrainer, PuppetTrainerMixin, default_arguments

__all__ = [
    "Distillation",
    "DistillationMixin",
    "DistillationTrainer",
    "MovementCallback",
    "PuppetCallback",
    "PuppetTrainer",
    "PuppetTrainerMixin",
    "RewardMovementMixin",
    "TextBlocks",
    "check_vocabulary",
    "default_arguments",
    "distillation_loss",
    "heal",
    "kl_reference",
    "last_good_checkpoint",
    "param_groups",
    "text_blocks",
    "verify_checkpoint",
]
