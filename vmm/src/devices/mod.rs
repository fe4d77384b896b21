//! Devices with registers of their own, apart from PCI: serial line and console, I/O APIC, power.

pub mod console;
pub mod generation;
pub mod ioapic;
pub mod power;
pub mod serial;
