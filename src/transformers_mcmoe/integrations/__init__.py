# SPDX-License-Identifier: Apache-2.0
"""Other libraries, one file each; a library is imported only when its functions are called."""
