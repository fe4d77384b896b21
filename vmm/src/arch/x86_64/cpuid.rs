//! What the guest sees of the processor: KVM's supported set with a few edits.
//!
//! The set from `KVM_GET_SUPPORTED_CPUID` says what this host can offer. Edited are: the topology (one package, each vCPU a
//! core of its own), features that depend on the interrupt controller, and features that would need what is not there.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use blixard_vmm_api::cpu::{CpuBaseline, CpuFeatures};

use super::capabilities;
use crate::snapshot::codec::{Invalid, Reader, Writer};
use crate::snapshot::plain;

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const BY_SUBLEAF: u32 = 1;

/// The processor has a TSC-deadline timer (leaf 1 ECX).
const TSC_DEADLINE: u32 = 1 << 24;
/// Running under a hypervisor (leaf 1 ECX).
const HYPERVISOR: u32 = 1 << 31;
/// More than one logical processor in the package (leaf 1 EDX).
const HTT: u32 = 1 << 28;

/// Features to hide: leaf, subleaf, register (0 EAX to 3 EDX), bits, reason.
#[rustfmt::skip]
const HIDDEN: [(u32, u32, usize, u32, &str); 7] = [
    (0x1, 0, 2, 1 << 2, "DTES64: no debug store"),
    (0x1, 0, 2, 1 << 3, "MONITOR: mwait is not given to the guest"),
    (0x1, 0, 2, 1 << 5, "VMX: no nested guests"),
    (0x1, 0, 2, 1 << 15, "PDCM: no performance capabilities without counters"),
    (0x1, 0, 3, 1 << 21, "DS: no debug store"),
    (0x8000_0001, 0, 2, 1 << 2, "SVM: no nested guests"),
    (0x8000_0001, 0, 2, 1 << 23 | 1 << 24, "PERFCTR_CORE, PERFCTR_NB: no performance counters"),
];

/// Whether the register of this leaf (0 EAX to 3 EDX) is a set of features, of which a guest may use each.
pub fn is_features(function: u32, index: u32, register: usize) -> bool {
    match function {
        0x1 => register >= 2,
        0x7 => register >= 1 || index > 0,
        0xD => (index == 0 && register != 1 && register != 2) || (index == 1 && register == 0),
        0x14 | 0x19 => register == 1,
        0x4000_0001 => register == 0,
        0x8000_0001 => register >= 2,
        0x8000_0007 => register == 3,
        0x8000_0008 => register == 1,
        0x8000_000A => register == 3,
        0x8000_0021 => register == 0,
        _ => false,
    }
}

/// What all vCPUs have in common.
#[derive(Debug)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u8,
    /// What a baseline has in `IA32_ARCH_CAPABILITIES`.
    arch_capabilities: Option<u64>,
}

impl Template {
    /// Edits the set that KVM supports. `tsc_deadline` says whether its local APIC has that timer.
    pub fn new(supported: &[kvm_cpuid_entry2], vcpus: u8, tsc_deadline: bool) -> Self {
        let highest = supported.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
        let mut entries: Vec<_> = supported
            .iter()
            // Topology leaves are written anew. 0x1F describes the same as 0xB; Linux takes 0xB when it is empty.
            .filter(|e| !matches!(e.function, 0xB | 0x1F))
            .copied()
            .collect();
        for entry in &mut entries {
            let registers = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
            for (number, register) in registers.into_iter().enumerate() {
                for (function, index, which, bits, _) in HIDDEN {
                    if (entry.function, entry.index, number) == (function, index, which) {
                        *register &= !bits;
                    }
                }
            }
            // Performance counters tell about neighbours on the same core.
            if matches!(entry.function, 0xA | 0x8000_0022) {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            if entry.function == 1 {
                entry.ecx |= HYPERVISOR;
                entry.ecx = if tsc_deadline { entry.ecx | TSC_DEADLINE } else { entry.ecx & !TSC_DEADLINE };
            }
        }
        if highest >= 0xB {
            entries.extend([0, 1, 2].map(|index| kvm_cpuid_entry2 {
                function: 0xB,
                index,
                flags: BY_SUBLEAF,
                ..Default::default()
            }));
        }
        Self { entries, vcpus, arch_capabilities: None }
    }

    /// Writes the set for a snapshot.
    pub fn save(&self, to: &mut Writer) {
        to.u32(u32::try_from(self.entries.len()).unwrap_or(u32::MAX));
        self.entries.iter().for_each(|entry| plain::write(to, entry));
    }

    /// Reads the set of a snapshot.
    ///
    /// # Errors
    /// It is cut off or too long.
    pub fn restore(from: &mut Reader<'_>, vcpus: u8) -> Result<Self, Invalid> {
        let count = from.count("CPUID entries", KVM_MAX_CPUID_ENTRIES)?;
        let entries = (0..count).map(|_| plain::read(from, "CPUID entry")).collect::<Result<_, _>>()?;
        Ok(Self { entries, vcpus, arch_capabilities: None })
    }

    /// A guest that was promised this set can go on where `host` is what the host has.
    ///
    /// # Errors
    /// What the host lacks.
    pub fn check_on(&self, host: &Self) -> Result<(), Invalid> {
        let vendor = |set: &Self| set.find(0, 0).map_or((0, 0, 0), |e| (e.ebx, e.ecx, e.edx));
        if vendor(self) != vendor(host) {
            return Err(Invalid::Mismatch("the processor is of another vendor".into()));
        }
        for entry in &self.entries {
            let here = host.find(entry.function, entry.index).unwrap_or_default();
            let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            for (number, (wanted, has)) in
                registers.iter().zip([here.eax, here.ebx, here.ecx, here.edx]).enumerate()
            {
                let lacking = wanted & !has;
                if is_features(entry.function, entry.index, number) && lacking != 0 {
                    let (leaf, subleaf) = (entry.function, entry.index);
                    let register = ["EAX", "EBX", "ECX", "EDX"].get(number).copied().unwrap_or_default();
                    return Err(Invalid::Mismatch(format!(
                        "the processor lacks features: CPUID leaf {leaf:#x}, subleaf {subleaf}, {register} bits {lacking:#x}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// What of the set are features.
    pub fn baseline(&self) -> CpuBaseline {
        let vendor = self.find(0, 0).unwrap_or_default();
        let name: Vec<u8> =
            [vendor.ebx, vendor.edx, vendor.ecx].iter().flat_map(|part| part.to_le_bytes()).collect();
        let features = self.entries.iter().filter_map(|entry| {
            let mut bits = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            for (register, bits) in bits.iter_mut().enumerate() {
                if !is_features(entry.function, entry.index, register) {
                    *bits = 0;
                }
            }
            (bits != [0; 4]).then_some(CpuFeatures { leaf: entry.function, subleaf: entry.index, bits })
        });
        CpuBaseline {
            vendor: String::from_utf8_lossy(&name).into_owned(),
            features: features.collect(),
            arch_capabilities: self.arch_capabilities,
        }
    }

    /// Offers no more than `baseline`.
    ///
    /// # Errors
    /// This host has less than that.
    pub fn limit(&mut self, baseline: &CpuBaseline) -> Result<(), Invalid> {
        let mine = self.baseline();
        if mine.vendor != baseline.vendor {
            return Err(Invalid::Mismatch(format!("cpu: this is a processor of {}", mine.vendor)));
        }
        for wanted in &baseline.features {
            let has = mine.bits(wanted.leaf, wanted.subleaf);
            for (wanted_bits, has) in wanted.bits.iter().zip(has) {
                if wanted_bits & !has != 0 {
                    let (leaf, subleaf, lacking) = (wanted.leaf, wanted.subleaf, wanted_bits & !has);
                    return Err(Invalid::Mismatch(format!(
                        "cpu: this host lacks bits {lacking:#x} of CPUID leaf {leaf:#x}, subleaf {subleaf}"
                    )));
                }
            }
        }
        self.arch_capabilities = baseline.arch_capabilities;
        for entry in &mut self.entries {
            let allowed = baseline.bits(entry.function, entry.index);
            let (function, index) = (entry.function, entry.index);
            let registers = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
            for (number, (register, allowed)) in registers.into_iter().zip(allowed).enumerate() {
                if is_features(function, index, number) {
                    *register &= allowed;
                }
            }
        }
        Ok(())
    }

    /// Whether guests have `IA32_ARCH_CAPABILITIES`.
    pub fn has_arch_capabilities(&self) -> bool {
        self.find(7, 0).is_some_and(|entry| entry.edx & capabilities::FEATURE != 0)
    }

    /// What guests read in `IA32_ARCH_CAPABILITIES`, when they have it and a baseline says what.
    pub fn arch_capabilities(&self) -> Option<u64> {
        self.arch_capabilities.filter(|_| self.has_arch_capabilities())
    }

    fn find(&self, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        self.entries.iter().find(|e| (e.function, e.index) == (function, index)).copied()
    }

    /// The set of vCPU `index`.
    ///
    /// # Errors
    /// There are more entries than KVM takes.
    pub fn for_vcpu(&self, index: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let mut entries = self.entries.clone();
        let (count, id) = (u32::from(self.vcpus), u32::from(index));
        // Bits of the APIC id that number the cores.
        let bits = count.next_power_of_two().trailing_zeros();
        for entry in &mut entries {
            match (entry.function, entry.index) {
                (0x1, _) => {
                    entry.ebx = entry.ebx & 0x0000_FFFF | count << 16 | id << 24;
                    entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
                }
                // Intel's caches: the first two levels belong to one core, the others to all.
                (0x4, _) if entry.eax & 0x1F != 0 => {
                    let level = entry.eax >> 5 & 7;
                    let sharing = if level < 3 { 0 } else { count - 1 };
                    entry.eax = entry.eax & 0x3FFF | sharing << 14 | (count - 1).min(63) << 26;
                }
                (0xB, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, id),
                (0xB, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (bits, count, 2 << 8 | 1, id),
                (0xB, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 2, id),
                (0x8000_0008, _) => entry.ecx = bits << 12 | (count - 1),
                // AMD's caches, as Intel's.
                (0x8000_001D, _) if entry.eax & 0x1F != 0 => {
                    let level = entry.eax >> 5 & 7;
                    let sharing = if level < 3 { 0 } else { count - 1 };
                    entry.eax = entry.eax & 0x3FFF | sharing << 14;
                }
                (0x8000_001E, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0),
                _ => {}
            }
        }
        CpuId::from_entries(&entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let entry = |function, index, all| kvm_cpuid_entry2 {
            function,
            index,
            eax: all,
            ebx: all,
            ecx: all,
            edx: all,
            ..Default::default()
        };
        let mut first = entry(0, 0, 0);
        first.eax = 0x1F;
        let rest = [0x1, 0x6, 0xA, 0xB, 0x1F, 0x8000_0001].map(|f| entry(f, 0, u32::MAX));
        [first].into_iter().chain(rest).collect()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn each_vcpu_is_a_core_with_its_own_id() {
        let cpuid = Template::new(&supported(), 6, true).for_vcpu(5).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16, 5 << 8 | 6);
        let cores = find(&cpuid, 0xB, 1);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, 5));
        assert!(!cpuid.as_slice().iter().any(|e| e.function == 0x1F));
    }

    #[test]
    fn a_guest_of_a_baseline_goes_on_wherever_the_baseline_is() {
        let host = |bits: u32| {
            let mut entries = supported();
            entries[1].ecx &= bits;
            Template::new(&entries, 1, true)
        };
        let (old, new) = (host(0xF0F0_F0F0), host(0xFFFF_0000));
        let both = old.baseline().intersect(&new.baseline()).unwrap();
        let mut guest = host(0xFFFF_0000);
        guest.limit(&both).unwrap();
        guest.check_on(&old).unwrap();
        guest.check_on(&new).unwrap();
        assert!(new.check_on(&old).unwrap_err().to_string().contains("CPUID leaf 0x1, subleaf 0, ECX"));
        assert!(host(0).limit(&both).unwrap_err().to_string().contains("this host lacks"));
    }

    #[test]
    fn what_cannot_work_is_hidden() {
        let cpuid = Template::new(&supported(), 1, false).for_vcpu(0).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx & (TSC_DEADLINE | 1 << 5 | 1 << 3), 0);
        assert_eq!(find(&cpuid, 1, 0).edx & HTT, 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & 1 << 2, 0);
        let counters = find(&cpuid, 0xA, 0);
        assert_eq!((counters.eax, counters.ebx, counters.ecx, counters.edx), (0, 0, 0, 0));
    }
}
