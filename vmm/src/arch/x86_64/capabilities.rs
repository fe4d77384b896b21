//! `IA32_ARCH_CAPABILITIES` (SDM 4, table 2-2): what a guest is told of faults that this processor does not have, and may
//! therefore leave unmitigated. KVM lets a VMM put any value there, so it is ours to see that it is true.

use blixard_vmm_api::cpu::broken_promises;

use crate::snapshot::codec::Invalid;

/// Number of the register.
pub const MSR: u32 = 0x10A;
/// Leaf 7 EDX: the register is there.
pub const FEATURE: u32 = 1 << 29;

/// Whether a guest that was told `promised` can run where the host has `here`, none when it does not tell.
///
/// # Errors
/// It believes to be safe from what it is not safe from.
pub fn check(promised: u64, here: Option<u64>) -> Result<(), Invalid> {
    match (broken_promises(promised, here.unwrap_or(0)), here) {
        (0, _) => Ok(()),
        (bits, Some(_)) => Err(Invalid::Mismatch(format!(
            "the guest is told of a processor without weaknesses that this one has: bits {bits:#x} of MSR {MSR:#x}"
        ))),
        (_, None) => {
            Err(Invalid::Mismatch(format!("this host does not tell its weaknesses: it has no MSR {MSR:#x}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_told_of_no_strength_that_the_host_lacks() {
        check(0b1000, Some(0b1001)).unwrap();
        check(0, None).unwrap();
        let lacking = check(0b1010, Some(0b1000)).unwrap_err().to_string();
        assert!(lacking.contains("bits 0x2 of MSR 0x10a"), "{lacking}");
        assert!(check(1, None).unwrap_err().to_string().contains("does not tell"));
        // RSBA is a weakness: the guest has to know of it.
        assert!(check(0, Some(0b100)).is_err());
        check(0b100, Some(0)).unwrap();
    }
}
