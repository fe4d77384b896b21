//! All state of a vCPU: read for a snapshot, written into a fresh vCPU before it runs.
//!
//! The floating-point state goes by `KVM_GET_XSAVE2` and `KVM_SET_XSAVE`, which carry what is valid; `KVM_SET_FPU` on a
//! fresh vCPU is lost again. Local APIC before MSRs: the TSC deadline counts only in the timer mode that the APIC has.

use std::os::fd::AsRawFd;

use blixard_vmm_api::cpu::broken_promises;
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SIPI_VECTOR, Msrs, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::capabilities;
use crate::ioctl;
use crate::snapshot::codec::{Invalid, Reader, Writer};
use crate::snapshot::plain;

/// Largest XSAVE area that is taken, in bytes; AMX needs 11 KiB.
const XSAVE_MAX: usize = 64 << 10;
/// Most model-specific registers.
const MSRS_MAX: usize = 1024;
/// Registers of one call (`KVM_MAX_MSR_ENTRIES` is 256).
const MSRS_PER_CALL: usize = 128;
const KVM_GET_XSAVE: libc::Ioctl = ioctl::number(0x9000_AEA4);
const KVM_GET_XSAVE2: libc::Ioctl = ioctl::number(0x9000_AECF);
const KVM_SET_XSAVE: libc::Ioctl = ioctl::number(0x5000_AEA5);
/// `IA32_TIME_STAMP_COUNTER`.
const MSR_TSC: u32 = 0x10;
/// Size of the area without `KVM_CAP_XSAVE2`.
const XSAVE_LEGACY: usize = 4096;
/// Where the header of the area tells which components it has (SDM 1, 13.4.2), and how many bytes the last one needs.
const XSTATE_BV: usize = 512;

/// Why the state of a vCPU cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// The kernel refuses.
    #[error("{call}")]
    Call {
        /// The call.
        call: &'static str,
        /// The system's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The kernel refuses a model-specific register.
    #[error("KVM_SET_MSRS: this host does not take {value:#x} in MSR {index:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// The guest was told what is not so here.
    #[error(transparent)]
    Promise(#[from] Invalid),
    /// A list for the kernel is too long.
    #[error("list of model-specific registers")]
    List,
    /// The state needs more room than this host has.
    #[error("XSAVE area of {0} bytes: this host has no such processor state")]
    Xsave(usize),
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Call { call, source }
}

/// State of a vCPU.
#[derive(Debug, Clone, PartialEq)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u8>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    mp_state: u32,
    events: kvm_vcpu_events,
    tsc_khz: u32,
    msrs: Vec<(u32, u64)>,
}

/// What of the host is needed to read or write states.
#[derive(Debug, Clone)]
pub struct HostState {
    /// Bytes of the XSAVE area: the answer to `KVM_CAP_XSAVE2`, 0 when it is not known.
    pub xsave: usize,
    /// Numbers of the model-specific registers that make up the state.
    pub msrs: Vec<u32>,
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run and whose last exit is completed.
    ///
    /// # Errors
    /// The kernel refuses a part.
    pub fn get(vcpu: &VcpuFd, host: &HostState) -> Result<Self, VcpuStateError> {
        // The multiprocessor state first: reading it lets KVM take what waits in the local APIC.
        let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?.mp_state;
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: get_xsave(vcpu, host)?,
            xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?,
            msrs: get_msrs(vcpu, &host.msrs)?,
            events: vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Writes the state into a fresh vCPU that has its CPUID.
    ///
    /// # Errors
    /// The kernel refuses a part.
    pub fn set(&self, vcpu: &VcpuFd, host: &HostState) -> Result<(), VcpuStateError> {
        let mp_state = kvm_mp_state { mp_state: self.mp_state };
        vcpu.set_mp_state(mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        set_xsave(vcpu, &self.xsave, host)?;
        vcpu.set_debug_regs(&self.debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        set_msrs(vcpu, &self.msrs)?;
        let mut events = self.events;
        // What the kernel told of these two is whole, though it does not say so.
        events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        vcpu.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    /// To be called for the first vCPU before [`Self::set`]. Kernels before 6.7 take a time stamp counter that is set to within a
    /// second of what it is for one that shall be synchronised, and leave it; that of a VM which was young at its snapshot
    /// would go backwards. Setting it to something far away first keeps them from that.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn part_from_creation(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        match self.msrs.iter().find(|(index, _)| *index == MSR_TSC) {
            Some((index, value)) => set_msrs(vcpu, &[(*index, value.wrapping_add(1 << 50))]),
            None => Ok(()),
        }
    }

    /// What the guest was told in `IA32_ARCH_CAPABILITIES`; a hostile state may say it more than once.
    pub fn arch_capabilities(&self) -> impl Iterator<Item = u64> {
        self.msrs.iter().filter(|(index, _)| *index == capabilities::MSR).map(|(_, value)| *value)
    }

    /// Frequency of the time stamp counter in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Writes the fields of the section.
    pub fn save(&self, to: &mut Writer) {
        plain::write(to, &self.regs);
        plain::write(to, &self.sregs);
        to.bytes(&self.xsave);
        plain::write(to, &self.xcrs);
        plain::write(to, &self.debug);
        plain::write(to, &self.lapic);
        to.u32(self.mp_state);
        plain::write(to, &self.events);
        to.u32(self.tsc_khz);
        to.u32(u32::try_from(self.msrs.len()).unwrap_or(u32::MAX));
        for (index, value) in &self.msrs {
            to.u32(*index);
            to.u64(*value);
        }
    }

    /// Reads the fields of the section. What they say is checked by the kernel when it is set.
    ///
    /// # Errors
    /// They are cut off or have lengths that cannot be.
    pub fn restore(from: &mut Reader<'_>) -> Result<Self, Invalid> {
        Ok(Self {
            regs: plain::read(from, "registers")?,
            sregs: plain::read(from, "special registers")?,
            xsave: from.bytes("XSAVE area", XSAVE_MAX)?.to_vec(),
            xcrs: plain::read(from, "extended control registers")?,
            debug: plain::read(from, "debug registers")?,
            lapic: plain::read(from, "local APIC")?,
            mp_state: from.u32("multiprocessor state")?,
            events: plain::read(from, "events")?,
            tsc_khz: from.u32("TSC frequency")?,
            msrs: {
                let count = from.count("MSRs", MSRS_MAX)?;
                (0..count).map(|_| Ok((from.u32("MSR")?, from.u64("MSR")?))).collect::<Result<_, _>>()?
            },
        })
    }
}

/// Lets the guest of a vCPU that has its CPUID read `promised` in `IA32_ARCH_CAPABILITIES`. A software flavour of KVM that takes no
/// value may show less than that.
///
/// # Errors
/// The kernel refuses, and shows more.
pub fn tell_arch_capabilities(vcpu: &VcpuFd, promised: u64) -> Result<(), VcpuStateError> {
    let Err(refused) = set_msrs(vcpu, &[(capabilities::MSR, promised)]) else { return Ok(()) };
    let shown = get_msrs(vcpu, &[capabilities::MSR])?.first().map_or(0, |(_, value)| *value);
    if broken_promises(shown, promised) == 0 { Ok(()) } else { Err(refused) }
}

fn xsave_call(
    vcpu: &VcpuFd,
    call: libc::Ioctl,
    name: &'static str,
    area: &mut [u64],
) -> Result<(), VcpuStateError> {
    // SAFETY: the area has the size that the kernel told for this call, and nothing else refers to it meanwhile.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), call, area.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(failed(name)(kvm_ioctls::Error::last())),
    }
}

fn get_xsave(vcpu: &VcpuFd, host: &HostState) -> Result<Vec<u8>, VcpuStateError> {
    let mut area = vec![0u64; host.xsave.max(XSAVE_LEGACY).div_ceil(8)];
    if host.xsave > 0 {
        xsave_call(vcpu, KVM_GET_XSAVE2, "KVM_GET_XSAVE2", &mut area)?;
    } else {
        xsave_call(vcpu, KVM_GET_XSAVE, "KVM_GET_XSAVE", &mut area)?;
    }
    let mut bytes: Vec<u8> = area.iter().flat_map(|word| word.to_le_bytes()).collect();
    // Components that were never used are zeros at the end.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(used.max(XSTATE_BV + 64));
    Ok(bytes)
}

fn set_xsave(vcpu: &VcpuFd, bytes: &[u8], host: &HostState) -> Result<(), VcpuStateError> {
    let mut area = vec![0u64; host.xsave.max(XSAVE_LEGACY).div_ceil(8)];
    if bytes.len() > area.len() * 8 {
        return Err(VcpuStateError::Xsave(bytes.len()));
    }
    for (to, from) in area.iter_mut().zip(bytes.chunks(8)) {
        let mut word = [0; 8];
        word.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        *to = u64::from_le_bytes(word);
    }
    xsave_call(vcpu, KVM_SET_XSAVE, "KVM_SET_XSAVE", &mut area)
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuStateError> {
    Msrs::from_entries(entries).map_err(|_| VcpuStateError::List)
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Reads registers; those that this processor does not have are left out.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked: Vec<_> = rest.iter().take(MSRS_PER_CALL).map(|index| entry(*index, 0)).collect();
        let mut msrs = list(&asked)?;
        let got = vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice().iter().take(got).map(|msr| (msr.index, msr.data)));
        // The kernel stops at the first that it cannot read.
        let done = if got < asked.len() { got + 1 } else { got };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(values)
}

fn set_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), VcpuStateError> {
    let mut rest = values;
    while !rest.is_empty() {
        let part: Vec<_> =
            rest.iter().take(MSRS_PER_CALL).map(|(index, value)| entry(*index, *value)).collect();
        let mut done = vcpu.set_msrs(&list(&part)?).map_err(failed("KVM_SET_MSRS"))?;
        if let Some((index, value)) = rest.get(done).filter(|_| done < part.len()) {
            // A register that cannot be written is no harm when it has this value anyway.
            let mut now = list(&[entry(*index, 0)])?;
            let read = vcpu.get_msrs(&mut now).map_err(failed("KVM_GET_MSRS"))?;
            if read != 1 || now.as_slice().first().is_none_or(|msr| msr.data != *value) {
                return Err(VcpuStateError::Msr { index: *index, value: *value });
            }
            done += 1;
        }
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_its_bytes_and_each_cut_is_noticed() {
        let state = VcpuState {
            regs: kvm_regs { rip: 0x10_0000, ..Default::default() },
            sregs: kvm_sregs::default(),
            xsave: vec![7; 600],
            xcrs: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            mp_state: 3,
            events: kvm_vcpu_events::default(),
            tsc_khz: 2_000_000,
            msrs: vec![(0x10, 5), (0x174, u64::MAX)],
        };
        let mut writer = Writer::new();
        state.save(&mut writer);
        let bytes = writer.into_bytes();
        assert_eq!(VcpuState::restore(&mut Reader::new(&bytes)).unwrap(), state);
        for length in 0..bytes.len() {
            assert!(VcpuState::restore(&mut Reader::new(&bytes[..length])).is_err());
        }
    }
}
