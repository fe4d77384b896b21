//! State files that somebody else made: as they come, and section by section, so that checksums need not be guessed.

use std::sync::Arc;

use super::registers::Nowhere;
use crate::arch::x86_64::cpuid::Template;
use crate::arch::x86_64::vcpu_state::VcpuState;
use crate::devices::ioapic::IoApic;
use crate::devices::serial::Serial;
use crate::mailbox::Mailbox;
use crate::pci::Root;
use crate::snapshot::codec::{Invalid, Reader, Writer};
use crate::snapshot::file::{State, StateWriter};
use crate::snapshot::sections::{Machine, Memory, extents, save_extents};

/// Pages of the memory that sections are about.
const PAGES: u64 = 1 << 20;

/// A state file, or a section of it.
pub(super) fn snapshot(data: &[u8]) {
    let Some((which, content)) = data.split_first() else { return };
    let from = &mut Reader::new(content);
    let ioapic = Arc::new(IoApic::new(Arc::new(Nowhere)));
    match which % 9 {
        0 => file(content),
        1 => twice(content, Machine::restore, Machine::save),
        2 => twice(content, |from| Memory::restore(from, PAGES), Memory::save),
        3 => twice(content, |from| extents(from, PAGES), |found, to| save_extents(found, to)),
        4 => {
            if let Ok(state) = VcpuState::restore(from) {
                state.save(&mut Writer::new());
                state.tsc_khz();
            }
        }
        5 => {
            if let Ok(mut template) = Template::restore(from, 32) {
                let _ = template.for_vcpu(31);
                let _ = template.check_on(&Template::new(&[], 1, true));
                template.save(&mut Writer::new());
                let _ = template.limit(&template.baseline());
            }
        }
        6 => {
            let _ = ioapic.restore(from);
            ioapic.set_line(5, true);
        }
        7 => {
            let mailbox = Arc::new(Mailbox::new().unwrap());
            let serial = Serial::new(ioapic, mailbox, Arc::default());
            let _ = serial.restore(from);
            (0..8).for_each(|register| {
                serial.read(register);
            });
        }
        _ => {
            let root = Root::new(vec![]);
            let _ = root.restore(from);
            root.port_write(4, &[0; 4]);
        }
    }
}

/// As it is; and as a section of a file whose checksums are right.
fn file(content: &[u8]) {
    parse(content);
    let mut writer = StateWriter::default();
    for (number, part) in content.chunks(60).take(4).enumerate() {
        let mut section = Writer::new();
        section.raw(part);
        writer.add(["machine", "memory", "cpu", "other"][number], section);
    }
    assert!(parse(&writer.into_bytes()));
}

fn parse(bytes: &[u8]) -> bool {
    let Ok(mut state) = State::parse(bytes) else { return false };
    let _ = state.take("machine", Machine::restore);
    let _ = state.take("memory", |from| Memory::restore(from, PAGES));
    let _ = state.finish();
    true
}

/// What a section says is the same when it is written and read once more.
fn twice<T: PartialEq + std::fmt::Debug>(
    content: &[u8],
    restore: impl Fn(&mut Reader<'_>) -> Result<T, Invalid>,
    save: impl Fn(&T, &mut Writer),
) {
    let Ok(found) = restore(&mut Reader::new(content)) else { return };
    let mut to = Writer::new();
    save(&found, &mut to);
    assert_eq!(restore(&mut Reader::new(&to.into_bytes())).ok(), Some(found));
}
