# SPDX-License-Identifier: Apache-2.0
"""Calibration: which tokens are run through a model, and what is measured on the way."""
