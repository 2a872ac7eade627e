"""Bayesian gates over the cost of computation (Push Puppet Networks, Kubinec 2026, arXiv 2606.28251)."""

from ppnet.gates.config import PuppetConfig
from ppnet.gates.puppet import Puppet

__all__ = ["Puppet", "PuppetConfig"]
