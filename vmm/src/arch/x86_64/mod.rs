//! x86-64: identification, registers and tables that a kernel finds at its entry.

pub mod acpi;
pub mod aml;
pub mod boot_params;
pub mod capabilities;
pub mod cpuid;
pub mod registers;
pub mod vcpu_state;
