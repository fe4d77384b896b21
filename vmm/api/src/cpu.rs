//! What guests may use of a processor, so that a snapshot can move between hosts: a set of feature bits that each of the hosts
//! has.

use serde::{Deserialize, Serialize};

/// Features of processors that are alike enough.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuBaseline {
    /// The vendor as CPUID tells it, for example `GenuineIntel`.
    pub vendor: String,
    /// Feature bits by CPUID leaf; what is not here is not offered.
    pub features: Vec<CpuFeatures>,
    /// What guests read in `IA32_ARCH_CAPABILITIES` (MSR 0x10a): against which faults of processors nothing has to be done.
    /// Absent: what each host says of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch_capabilities: Option<u64>,
}

/// Bits of `IA32_ARCH_CAPABILITIES` that say that a processor is weak, RSBA and RRSBA: where one of several hosts is so, a guest
/// that moves between them has to know. All other bits are strengths, which each of the hosts needs.
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;

/// Of what `promised` says there is in `IA32_ARCH_CAPABILITIES`, the bits that a host which has `here` does not keep: strengths
/// that it lacks, and weaknesses that it has besides.
pub fn broken_promises(promised: u64, here: u64) -> u64 {
    promised & !here & !WEAKNESSES | here & !promised & WEAKNESSES
}

/// Feature bits of a CPUID leaf. Registers that are no sets of features are 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuFeatures {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// Bits of EAX, EBX, ECX and EDX.
    pub bits: [u32; 4],
}

/// Two processors that have no baseline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("processors of {0} and of {1} have no features in common that a guest could move with")]
pub struct OtherVendor(pub String, pub String);

impl CpuBaseline {
    /// The bits of a leaf; none when it is not offered.
    pub fn bits(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let found = self.features.iter().find(|f| (f.leaf, f.subleaf) == (leaf, subleaf));
        found.map_or([0; 4], |features| features.bits)
    }

    /// What both have.
    ///
    /// # Errors
    /// They are of different vendors.
    pub fn intersect(&self, other: &Self) -> Result<Self, OtherVendor> {
        if self.vendor != other.vendor {
            return Err(OtherVendor(self.vendor.clone(), other.vendor.clone()));
        }
        let both = |mine: &CpuFeatures| {
            let theirs = other.bits(mine.leaf, mine.subleaf);
            let mut bits = mine.bits;
            bits.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine &= theirs);
            CpuFeatures { bits, ..*mine }
        };
        let features = self.features.iter().map(both).filter(|f| f.bits != [0; 4]).collect();
        let capabilities = self.arch_capabilities.zip(other.arch_capabilities);
        let arch_capabilities =
            capabilities.map(|(mine, theirs)| mine & theirs & !WEAKNESSES | (mine | theirs) & WEAKNESSES);
        Ok(Self { vendor: self.vendor.clone(), features, arch_capabilities })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline(vendor: &str, leaves: &[(u32, u32)]) -> CpuBaseline {
        let leaf = |(leaf, ecx): &(u32, u32)| CpuFeatures { leaf: *leaf, subleaf: 0, bits: [0, 0, *ecx, 0] };
        CpuBaseline {
            vendor: vendor.into(),
            features: leaves.iter().map(leaf).collect(),
            arch_capabilities: None,
        }
    }

    #[test]
    fn each_host_keeps_what_the_common_capabilities_promise() {
        let host = |capabilities| CpuBaseline { arch_capabilities: capabilities, ..baseline("A", &[]) };
        // The first needs no help against 0 and 5, the second none against 0, but is weak at 2 and 19.
        let (one, other) = (0b10_0001, 1 << 19 | 0b101);
        let both = host(Some(one)).intersect(&host(Some(other))).unwrap().arch_capabilities.unwrap();
        assert_eq!(both, 1 << 19 | 0b101);
        assert_eq!((broken_promises(both, one), broken_promises(both, other)), (0, 0));
        assert_eq!(broken_promises(one, other), 1 << 19 | 0b10_0100);
        assert_eq!(broken_promises(other, one), 0);
        assert_eq!(host(Some(one)).intersect(&host(None)).unwrap().arch_capabilities, None);
        let text = serde_json::to_string(&host(None)).unwrap();
        assert!(!text.contains("arch_capabilities"), "older VMMs read {text}");
    }

    #[test]
    fn only_what_both_have_is_left() {
        let (one, other) =
            (baseline("A", &[(1, 0b1100), (7, 1), (9, 1)]), baseline("A", &[(1, 0b0110), (7, 2)]));
        assert_eq!(one.intersect(&other), Ok(baseline("A", &[(1, 0b0100)])));
        assert_eq!(one.intersect(&one), Ok(one.clone()));
        assert!(one.intersect(&baseline("B", &[])).is_err());
    }
}
