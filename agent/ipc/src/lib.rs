//! Bounded SEQPACKET messages with passed descriptors between the processes of one node.
