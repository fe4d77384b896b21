//! Bridges, TAPs, addresses and packet filter of one node.
