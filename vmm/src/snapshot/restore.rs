//! Puts the state of a snapshot into a fresh VM. Everything is checked before a vCPU runs.
//!
//! ```text
//!   open ──► memory ──► order of devices ──► cpu, clock, vCPUs ──► registers of devices ──► finish: nothing was left over
//! ```

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use blixard_vmm_api::snapshot::{MemoryConfig, Paging, RestoreConfig, SnapshotFiles};
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VcpuFd;
use vm_memory::bitmap::Bitmap;

use super::codec::{Invalid, Reader};
use super::file::{FileError, State};
use super::plain;
use super::save::device_section;
use super::sections::{Machine, Memory, extents};
use crate::arch::x86_64::capabilities;
use crate::arch::x86_64::cpuid::Template;
use crate::arch::x86_64::vcpu_state::{HostState, VcpuState, VcpuStateError};
use crate::bus::Bus;
use crate::descriptors::{DescriptorError, Descriptors};
use crate::kvm::{KvmError, Vm};
use crate::layout::MIB;
use crate::memory::dirty::PAGE;
use crate::memory::pages::{Extent, Pages};
use crate::memory::ram::{Base, Ram};
use crate::memory::userfault::{Userfault, UserfaultError};
use crate::memory::{self, MemoryError, sparse};
use crate::worker::Slot;

/// Deviation of the time stamp frequency that KVM takes for none, in parts per million.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Largest working set file in bytes.
const WORKING_SET_MAX: u64 = 1 << 20;

/// Why a snapshot is refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A descriptor is not there.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// A state file is refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// A memory file is refused.
    #[error("snapshot: memory file: {0}")]
    MemoryFile(String),
    /// A memory file cannot be read.
    #[error("snapshot: read the memory file")]
    ReadMemory(#[source] io::Error),
    /// Memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The configuration is of another VM.
    #[error("snapshot: section machine: {0}")]
    Machine(String),
    /// A vCPU does not take its state.
    #[error("snapshot: section vcpu.{index}")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: VcpuStateError,
    },
    /// The time stamp counter has another frequency.
    #[error(
        "snapshot: section vcpu.{index}: time stamp counter of {saved} kHz, this host has {host} kHz and cannot scale"
    )]
    Tsc {
        /// Which vCPU.
        index: usize,
        /// What the guest knows.
        saved: u32,
        /// What there is.
        host: u32,
    },
    /// Nobody can answer page faults.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// The VM does not take its state.
    #[error("snapshot: section clock")]
    Clock(#[source] KvmError),
    /// The kernel refuses something else.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// A snapshot that is being restored.
pub struct Restore {
    state: State,
    machine: Machine,
    memory: Memory,
    /// The files of full and diff snapshots, oldest first, without the state that is being restored.
    layers: Vec<Layer>,
    working_set: Vec<Extent>,
    clock_went_on: bool,
    options: MemoryConfig,
    paging: Paging,
    userfaultfd: Option<OwnedFd>,
}

/// A snapshot's memory.
struct Layer {
    state: Arc<File>,
    file: Arc<File>,
    memory: Memory,
}

fn take(files: &SnapshotFiles, given: &mut Descriptors) -> Result<(File, File), DescriptorError> {
    Ok((given.take(&files.state)?.into(), given.take(&files.memory)?.into()))
}

fn sections(state: &mut State) -> Result<(Machine, Memory), FileError> {
    let machine = state.take("machine", Machine::restore)?;
    let memory = state.take("memory", |from| Memory::restore(from, machine.memory / 4096))?;
    Ok((machine, memory))
}

impl Restore {
    /// Reads the state files and compares them with each other and with what is configured.
    ///
    /// # Errors
    /// They are refused, or do not belong together.
    pub fn open(
        config: &RestoreConfig,
        given: &mut Descriptors,
        vcpus: u8,
        memory_mib: u32,
        options: MemoryConfig,
    ) -> Result<Self, RestoreError> {
        let mut layers: Vec<Layer> = vec![];
        for files in &config.bases {
            let (state, file) = take(files, given)?;
            let (_, memory) = sections(&mut State::read_from(&state)?)?;
            layers.push(Layer { state: Arc::new(state), file: Arc::new(file), memory });
        }
        let (file, memory_file) = take(&config.snapshot, given)?;
        let mut state = State::read_from(&file)?;
        let (machine, memory) = sections(&mut state)?;
        layers.push(Layer { state: Arc::new(file), file: Arc::new(memory_file), memory: memory.clone() });
        let working_set = match &config.working_set {
            Some(name) => read_working_set(&given.take(name)?.into(), machine.memory / 4096)?,
            None => vec![],
        };
        let userfaultfd = config.userfaultfd.as_ref().map(|name| given.take(name)).transpose()?;
        let (clock_went_on, paging) = (config.clock_went_on, config.paging);
        let restore =
            Self { state, machine, memory, layers, working_set, clock_went_on, options, paging, userfaultfd };
        restore.check(vcpus, u64::from(memory_mib) * MIB)?;
        Ok(restore)
    }

    fn check(&self, vcpus: u8, memory: u64) -> Result<(), RestoreError> {
        let Machine { vcpus: saved_vcpus, memory: saved_memory, .. } = &self.machine;
        if *saved_vcpus != vcpus {
            let what = format!("{saved_vcpus} vCPUs, {vcpus} are configured");
            return Err(RestoreError::Machine(what));
        }
        if *saved_memory != memory {
            let what = format!("{} bytes of memory, {memory} are configured", saved_memory);
            return Err(RestoreError::Machine(what));
        }
        let mut before = None;
        for layer in &self.layers {
            if layer.memory.parent != before {
                let show = |id: Option<super::Id>| id.map_or("nothing".to_owned(), |id| id.to_string());
                let what = format!(
                    "snapshot {} is based on {}, not on {}",
                    layer.memory.id,
                    show(layer.memory.parent),
                    show(before)
                );
                return Err(RestoreError::MemoryFile(what));
            }
            before = Some(layer.memory.id);
            let metadata = layer.file.metadata().map_err(RestoreError::ReadMemory)?;
            if !metadata.is_file() || metadata.len() != memory {
                let what = format!("{} bytes, the snapshot has {memory} bytes of memory", metadata.len());
                return Err(RestoreError::MemoryFile(what));
            }
        }
        Ok(())
    }

    /// Guest memory, and who shall answer its page faults.
    ///
    /// # Errors
    /// It cannot be mapped or read.
    pub fn memory(&self) -> Result<(Ram, Option<Userfault>), RestoreError> {
        let (Some(full), diffs) = (self.layers.first(), self.layers.get(1..).unwrap_or_default()) else {
            return Err(RestoreError::MemoryFile("none".into()));
        };
        let size = self.machine.memory;
        let memory = match self.paging {
            Paging::Map => memory::map_private(&full.file, size, self.options)?,
            Paging::Userfault => memory::map_empty(size)?,
        };
        if self.paging == Paging::Map {
            sparse::prefetch(&memory, &self.working_set);
        } else {
            let read = sparse::read(&memory, &self.working_set, &full.file);
            read.map_err(RestoreError::ReadMemory)?;
        }
        let mut own = Pages::new(size / 4096);
        for diff in diffs {
            sparse::read(&memory, &diff.memory.extents, &diff.file).map_err(RestoreError::ReadMemory)?;
            diff.memory.extents.iter().for_each(|extent| own.add(*extent));
        }
        let userfault = match self.paging {
            Paging::Map => None,
            Paging::Userfault => {
                let pager = Userfault::new(self.userfaultfd.as_ref(), &memory, &full.file)?;
                let (pages, used) = (size / 4096, pager.used());
                for (first, count) in self.working_set.iter().filter(|(first, _)| u64::from(*first) < pages) {
                    let bytes = |pages: u32| usize::try_from(pages).unwrap_or(0).saturating_mul(PAGE);
                    used.mark_dirty(bytes(*first), bytes(*count));
                }
                Some(pager)
            }
        };
        let base = Base { state: full.state.clone(), memory: full.file.clone(), id: full.memory.id };
        Ok((Ram::restored(&memory, base, own, self.memory.id, self.options), userfault))
    }

    /// The configured devices in the order that the guest knows.
    ///
    /// # Errors
    /// One is not in the snapshot, or one of the snapshot is not configured.
    pub fn in_order<T>(&self, mut devices: Vec<(String, T)>) -> Result<Vec<(String, T)>, RestoreError> {
        let mut ordered = Vec::with_capacity(devices.len());
        for name in &self.machine.devices {
            let Some(at) = devices.iter().position(|(configured, _)| configured == name) else {
                return Err(RestoreError::Machine(format!("device {name} is not configured")));
            };
            ordered.push(devices.swap_remove(at));
        }
        match devices.first() {
            Some((name, _)) => Err(RestoreError::Machine(format!("device {name} is not in the snapshot"))),
            None => Ok(ordered),
        }
    }

    /// Whether there is a boot timer.
    pub fn boot_timer(&self) -> bool {
        self.machine.boot_timer
    }

    /// What the guest was promised of the processor.
    ///
    /// # Errors
    /// This host lacks something of it.
    pub fn template(&mut self, host: &Template) -> Result<Template, RestoreError> {
        let vcpus = self.machine.vcpus;
        let read = |from: &mut Reader<'_>| {
            let saved = Template::restore(from, vcpus)?;
            saved.check_on(host).map(|()| saved)
        };
        Ok(self.state.take("cpu", read)?)
    }

    /// Writes clock and vCPUs.
    ///
    /// # Errors
    /// This host does not take them.
    pub fn vcpus(&mut self, vm: &Vm, vcpus: &[VcpuFd], template: &Template) -> Result<(), RestoreError> {
        let clock: kvm_clock_data = self.state.take("clock", |from| plain::read(from, "clock"))?;
        let host = vm.host_state()?;
        let states: Result<Vec<VcpuState>, FileError> = (0..vcpus.len())
            .map(|index| self.state.take(&format!("vcpu.{index}"), VcpuState::restore))
            .collect();
        let here = if template.has_arch_capabilities() { vm.arch_capabilities()? } else { None };
        for (index, (state, vcpu)) in states?.iter().zip(vcpus).enumerate() {
            for promised in state.arch_capabilities().filter(|_| template.has_arch_capabilities()) {
                let kept = capabilities::check(promised, here);
                kept.map_err(|error| RestoreError::Vcpu { index, source: error.into() })?;
            }
            set_vcpu(vm, vcpu, index, state, template, &host)?;
        }
        // Behind the vCPUs: what they say of their time stamp counters is where the clock starts from.
        vm.set_clock(&clock, self.clock_went_on).map_err(RestoreError::Clock)
    }

    /// Writes the registers of all devices. Devices that were active are activated by the I/O thread's first turn.
    ///
    /// # Errors
    /// A section is refused.
    pub fn devices(&mut self, bus: &Bus, slots: &mut [Slot]) -> Result<(), RestoreError> {
        self.state.take("serial", |from| bus.serial.restore(from))?;
        self.state.take("ioapic", |from| bus.ioapic.restore(from))?;
        self.state.take("pci", |from| bus.pci.restore(from))?;
        for slot in slots {
            let Slot { name, device, transport, .. } = slot;
            let restore = |from: &mut Reader<'_>| {
                transport.restore(from)?;
                device.restore(from)
            };
            self.state.take(&device_section(name), restore)?;
        }
        Ok(())
    }

    /// The end: whether init had reported ready.
    ///
    /// # Errors
    /// The snapshot has something that is not known here.
    pub fn finish(&mut self) -> Result<bool, RestoreError> {
        let ready = self.state.take_optional("guest", |from| from.bool("ready"))?;
        self.state.finish()?;
        Ok(ready.unwrap_or(false))
    }
}

fn set_vcpu(
    vm: &Vm,
    vcpu: &VcpuFd,
    index: usize,
    state: &VcpuState,
    template: &Template,
    host: &HostState,
) -> Result<(), RestoreError> {
    let failed =
        |call| move |source| RestoreError::Vcpu { index, source: VcpuStateError::Call { call, source } };
    let number = u8::try_from(index).unwrap_or(u8::MAX);
    let cpuid = template.for_vcpu(number);
    let cpuid = cpuid.map_err(|_| RestoreError::Vcpu { index, source: VcpuStateError::List })?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    let (saved, here) = (state.tsc_khz(), vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?);
    let deviation = u64::from(saved.abs_diff(here)) * 1_000_000;
    if deviation > u64::from(here) * TSC_TOLERANCE_PPM {
        if !vm.scales_tsc() {
            return Err(RestoreError::Tsc { index, saved, host: here });
        }
        vcpu.set_tsc_khz(saved).map_err(failed("KVM_SET_TSC_KHZ"))?;
    }
    let parted = if index == 0 { state.part_from_creation(vcpu) } else { Ok(()) };
    parted.and_then(|()| state.set(vcpu, host)).map_err(|source| RestoreError::Vcpu { index, source })
}

/// A working set is a state file with one section.
fn read_working_set(file: &File, pages: u64) -> Result<Vec<Extent>, RestoreError> {
    let length = file.metadata().map_err(RestoreError::ReadMemory)?.len();
    if length > WORKING_SET_MAX {
        let source = Invalid::Value { what: "length", value: length };
        return Err(FileError::Refused { name: "working-set".into(), source }.into());
    }
    Ok(State::read_from(file)?.take("working-set", |from| extents(from, pages))?)
}
