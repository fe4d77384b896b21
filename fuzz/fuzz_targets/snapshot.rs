//! A state file of somebody else: as it comes, and with its checksums made right so that the content of sections is reached.
#![no_main]

use blixard_vmm::arch::x86_64::cpuid::Template;
use blixard_vmm::arch::x86_64::vcpu_state::VcpuState;
use blixard_vmm::devices::ioapic::{IoApic, Signal};
use blixard_vmm::devices::serial::Serial;
use blixard_vmm::mailbox::Mailbox;
use blixard_vmm::pci::Root;
use blixard_vmm::snapshot::codec::Reader;
use blixard_vmm::snapshot::file::State;
use blixard_vmm::snapshot::sections::{Machine, Memory, extents};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

struct Nowhere;

impl Signal for Nowhere {
    fn signal(&self, _: u64, _: u32) {}
}

fuzz_target!(|data: &[u8]| {
    if let Ok(mut state) = State::parse(data) {
        let _ = state.take("machine", Machine::restore);
        let _ = state.take("memory", |from| Memory::restore(from, 4096));
        let _ = state.finish();
    }
    let Some((which, content)) = data.split_first() else { return };
    let from = &mut Reader::new(content);
    let ioapic = Arc::new(IoApic::new(Arc::new(Nowhere)));
    match which % 8 {
        0 => drop(Machine::restore(from)),
        1 => drop(Memory::restore(from, 1 << 20)),
        2 => drop(extents(from, u64::MAX)),
        3 => drop(VcpuState::restore(from)),
        4 => {
            if let Ok(template) = Template::restore(from, 32) {
                let _ = template.for_vcpu(31);
                let _ = template.check_on(&Template::new(&[], 1, true));
            }
        }
        5 => {
            let _ = ioapic.restore(from);
            ioapic.set_line(5, true);
        }
        6 => {
            let mailbox = Arc::new(Mailbox::new().expect("eventfd"));
            let serial = Serial::new(ioapic, mailbox, Arc::default());
            let _ = serial.restore(from);
            (0..8).for_each(|register| drop(serial.read(register)));
        }
        _ => {
            let root = Root::new(vec![]);
            let _ = root.restore(from);
            root.port_write(4, &[0; 4]);
        }
    }
});
