//! Power off and reset, as a guest asks for them: ACPI sleep control, reset register, keyboard controller.

use blixard_vmm_api::ExitReason;

use crate::arch::x86_64::acpi::SLEEP_TYPE_S5;
use crate::layout::{I8042_COMMAND_PORT, RESET_PORT, SLEEP_CONTROL_PORT};

/// `SLP_EN` of the sleep control register (ACPI 6.5 table 4.18); the type is in bits 2-4.
const SLEEP_ENABLE: u8 = 1 << 5;
/// The bit of the reset control register that starts a reset.
const RESET_CPU: u8 = 1 << 2;
/// Keyboard controller: pulse the reset line.
const I8042_RESET: u8 = 0xFE;

/// What a write of `value` to `port` does to the VM, if anything.
pub fn write(port: u16, value: u8) -> Option<ExitReason> {
    match port {
        SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => {
            Some(ExitReason::PowerOff)
        }
        RESET_PORT if value & RESET_CPU != 0 => Some(ExitReason::Reset),
        I8042_COMMAND_PORT if value == I8042_RESET => Some(ExitReason::Reset),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_agreed_values_end_the_vm() {
        assert_eq!(write(SLEEP_CONTROL_PORT, 5 << 2 | 1 << 5), Some(ExitReason::PowerOff));
        assert_eq!(write(SLEEP_CONTROL_PORT, 5 << 2), None);
        assert_eq!(write(SLEEP_CONTROL_PORT, 3 << 2 | 1 << 5), None);
        assert_eq!(write(RESET_PORT, 0x06), Some(ExitReason::Reset));
        assert_eq!(write(RESET_PORT, 0x02), None);
        assert_eq!(write(I8042_COMMAND_PORT, 0xFE), Some(ExitReason::Reset));
        assert_eq!(write(I8042_COMMAND_PORT, 0xD1), None);
    }
}
