# SPDX-License-Identifier: Apache-2.0
"""What transformers models look like: their experts, their checkpoint names, their decoder layers."""
