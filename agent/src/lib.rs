//! The privileged hand of one node.
