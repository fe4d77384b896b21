//! The VM in the kernel, from the passed descriptor of `/dev/kvm`.
//!
//! The order of calls matters more than anything else at start: the split interrupt controller and memory slots come
//! first and there is no PIT. After `KVM_CREATE_IRQCHIP` or `KVM_CREATE_PIT2` a new memory slot waits for milliseconds.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_CLOCK_REALTIME, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, Msrs, kvm_clock_data, kvm_enable_cap, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::x86_64::capabilities;
use crate::arch::x86_64::cpuid::Template;
use crate::arch::x86_64::vcpu_state::HostState;
use crate::layout::{IOAPIC_PINS, KVM_TSS};
use crate::virtio::device::GuestMemory;
use crate::virtio::pmem::Mapping;

/// Why the kernel does not give us a VM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not `/dev/kvm`, or one of another age.
    #[error("kvm: the descriptor answers API version {0}, {KVM_API_VERSION} is needed: is it /dev/kvm?")]
    Version(i32),
    /// A call failed.
    #[error("kvm: {call}")]
    Call {
        /// Which.
        call: &'static str,
        /// The system's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { call, source }
}

/// A VM without vCPUs.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
}

impl Vm {
    /// Makes a VM with local APICs in the kernel and the I/O APIC left to us.
    ///
    /// # Errors
    /// The descriptor is not `/dev/kvm`, or the kernel lacks something.
    pub fn new(kvm: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: ownership of the descriptor moves from `kvm` to the new value.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(KvmError::Version(version));
        }
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let pins = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [IOAPIC_PINS.into(), 0, 0, 0],
            ..Default::default()
        };
        fd.enable_cap(&pins).map_err(failed("enable KVM_CAP_SPLIT_IRQCHIP"))?;
        fd.set_tss_address(KVM_TSS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        Ok(Self { kvm, fd: Arc::new(fd) })
    }

    /// The VM's descriptor, for interrupts and I/O events.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// Gives the VM its memory, before vCPUs exist; or changes whether writes to it are logged.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_memory(&self, memory: &GuestMemory, log_writes: bool) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: if log_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                // An address is a number here; the lossless conversion has no safe name.
                userspace_addr: region.get_mmap().as_ptr().addr() as u64,
            };
            // SAFETY: the range is the whole mapping of `region`, which the caller keeps for the life of the process:
            // `GuestMemory` is shared by everything that runs until exit. Slots do not overlap, since regions do not.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Pages of region `slot`, of `bytes` bytes, that the guest wrote since the last call.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn take_log(&self, slot: u32, bytes: usize) -> Result<Vec<u64>, KvmError> {
        self.fd.get_dirty_log(slot, bytes).map_err(failed("KVM_GET_DIRTY_LOG"))
    }

    /// Puts a persistent memory at the guest address `start`. `number` is its slot, behind those of memory. To be called
    /// before vCPUs exist.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add_pmem(&self, number: u32, start: u64, mapping: Mapping) -> Result<(), KvmError> {
        let slot = kvm_userspace_memory_region {
            slot: number,
            flags: if mapping.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: start,
            memory_size: mapping.length,
            userspace_addr: mapping.address,
        };
        // SAFETY: nobody here refers to the content of the mapping, and when it goes with its device the kernel takes it
        // out of the VM. It lies behind memory and all earlier slots.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// What this host can show its guests of the processor.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn cpuid(&self, vcpus: u8) -> Result<Template, KvmError> {
        let supported =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = self.fd.check_extension(Cap::TscDeadlineTimer);
        Ok(Template::new(supported.as_slice(), vcpus, deadline))
    }

    /// What this host has in `IA32_ARCH_CAPABILITIES`, as far as KVM shows it to guests.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn arch_capabilities(&self) -> Result<Option<u64>, KvmError> {
        let wanted = kvm_msr_entry { index: capabilities::MSR, ..Default::default() };
        let failed = || failed("KVM_GET_MSRS");
        let list = Msrs::from_entries(&[wanted]);
        let mut msrs = list.map_err(|_| failed()(kvm_ioctls::Error::new(libc::ENOMEM)))?;
        let got = self.kvm.get_msrs(&mut msrs).map_err(failed())?;
        Ok(msrs.as_slice().first().filter(|_| got == 1).map(|msr| msr.data))
    }

    /// What is needed to read or write the state of vCPUs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn host_state(&self) -> Result<HostState, KvmError> {
        let msrs = self.kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let xsave = usize::try_from(self.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(HostState { xsave, msrs: msrs.as_slice().to_vec() })
    }

    /// The VM's clock, for a snapshot.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn clock(&self) -> Result<kvm_clock_data, KvmError> {
        self.fd.get_clock().map_err(failed("KVM_GET_CLOCK"))
    }

    /// Sets the VM's clock to that of a snapshot; with `realtime` the time since then has passed for the guest too, where
    /// both hosts' kernels know the real time of their clocks.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_clock(&self, saved: &kvm_clock_data, realtime: bool) -> Result<(), KvmError> {
        let flags = if realtime { saved.flags & KVM_CLOCK_REALTIME } else { 0 };
        let clock = kvm_clock_data { flags, host_tsc: 0, pad0: 0, pad: [0; 4], ..*saved };
        self.fd.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }

    /// Whether vCPUs may get another time stamp frequency than the host's.
    pub fn scales_tsc(&self) -> bool {
        self.fd.check_extension(Cap::TscControl)
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(index.into()).map_err(failed("KVM_CREATE_VCPU"))
    }
}
