//! Makes the state file of a paused VM.

use std::fs::File;

use super::Id;
use super::codec::Writer;
use super::file::{FileError, StateWriter};
use super::plain;
use super::sections::{Machine, Memory};
use crate::arch::x86_64::cpuid::Template;
use crate::arch::x86_64::vcpu_state::VcpuState;
use crate::bus::Bus;
use crate::kvm::{KvmError, Vm};
use crate::memory::ram::{RamError, Written};
use crate::vcpu::VcpuError;
use crate::worker::Slot;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The descriptors are not those that are needed.
    #[error("{0}")]
    Descriptors(&'static str),
    /// A vCPU does not tell its state.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The VM does not tell its state.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory cannot be written.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The state cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There are no random bytes for an id, or no file in memory.
    #[error("{what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// What the state of a VM is made of.
pub struct Parts<'a> {
    /// The VM in the kernel.
    pub vm: &'a Vm,
    /// What vCPUs are promised.
    pub template: &'a Template,
    /// States of all vCPUs.
    pub vcpus: &'a [VcpuState],
    /// What vCPUs reach.
    pub bus: &'a Bus,
    /// Devices, at rest.
    pub slots: &'a [Slot],
    /// Bytes of memory.
    pub memory: u64,
    /// Whether init has reported ready.
    pub guest_ready: bool,
}

impl Parts<'_> {
    /// Writes the state of snapshot `id`, whose memory was written before. Answers the number of bytes.
    ///
    /// # Errors
    /// The VM does not tell its state, or the file cannot be written.
    pub fn write(&self, id: Id, memory: &Written, file: &File) -> Result<u64, SaveError> {
        let mut state = StateWriter::default();
        let mut section = |name: &str, save: &dyn Fn(&mut Writer)| {
            let mut fields = Writer::new();
            save(&mut fields);
            state.add(name, fields);
        };
        let machine = Machine {
            vcpus: u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX),
            boot_timer: self.bus.boot_timer,
            memory: self.memory,
            devices: self.slots.iter().map(|slot| slot.name.clone()).collect(),
        };
        section("machine", &|to| machine.save(to));
        let memory = Memory { id, parent: memory.parent, extents: memory.extents.clone() };
        section("memory", &|to| memory.save(to));
        section("cpu", &|to| self.template.save(to));
        let clock = self.vm.clock()?;
        section("clock", &|to| plain::write(to, &clock));
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            section(&format!("vcpu.{index}"), &|to| vcpu.save(to));
        }
        section("serial", &|to| self.bus.serial.save(to));
        section("ioapic", &|to| self.bus.ioapic.save(to));
        section("pci", &|to| self.bus.pci.save(to));
        for slot in self.slots {
            section(&device_section(&slot.name), &|to| {
                slot.transport.save(to);
                slot.device.save(to);
            });
        }
        let mut guest = Writer::new();
        guest.bool(self.guest_ready);
        state.add_optional("guest", guest);
        Ok(state.write_to(file)?)
    }
}

/// Name of the section of a device.
pub fn device_section(name: &str) -> String {
    format!("dev.{name}")
}

/// Whether writing to this descriptor can never wait for a reader.
pub fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file())
}
