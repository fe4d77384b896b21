//! Snapshots, restores and forks of whole VMs: a guest goes on where it was, loses nothing and repeats nothing.

use crate::code;
use crate::vm::{Vm, possible};

/// Writes the kernel of [`code::prints_letters`] where `KERNEL` says, for trying things by hand.
#[test]
#[ignore = "for trying things by hand"]
fn write_kernel() {
    std::fs::write(std::env::var("KERNEL").unwrap(), code::prints_letters().elf()).unwrap();
}
