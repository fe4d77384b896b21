//! Snapshots: the state of a VM as a file of named sections beside a file with its memory. `README.md` has design and format.

pub mod codec;
pub mod file;
