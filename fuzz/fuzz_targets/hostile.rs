//! A guest whose every descriptor, ring index and buffer is made of fuzz input: shared by the targets of virtio devices.

use std::time::Duration;

use blixard_vmm::virtio::device::Device;
use blixard_vmm::virtio::guest_driver::{Machine, write_descriptor};

/// What is left of the input.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    pub fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let given = self.bytes(8);
        bytes[..given.len()].copy_from_slice(given);
        u64::from_le_bytes(bytes)
    }
}

/// Most steps of one input: more only takes time.
const STEPS: usize = 200;

/// Drives `machine` until the input is used up. Steps that are not about queues go to `other`.
pub fn drive<D: Device>(
    machine: &mut Machine<D>,
    input: &mut Input<'_>,
    mut other: impl FnMut(&mut Machine<D>, &mut Input<'_>),
) {
    let mut offered = vec![0u16; machine.queues.len()];
    for _ in 0..STEPS {
        let Some(step) = input.byte() else { break };
        let index = usize::from(step >> 4) % machine.queues.len();
        match step & 15 {
            // A descriptor, mostly near the buffers.
            0..=3 => {
                let place = u16::from(input.byte().unwrap_or(0));
                let number = input.number();
                let address = machine.buffers + (number & 0xF_FFFF);
                let address = if step & 3 == 3 { number } else { address };
                let length = (number >> 32) as u32 & if step & 2 == 0 { 0xFFF } else { u32::MAX };
                let flags = (number >> 20) as u16 & 7;
                machine.queues[index].descriptor(place, address, length, flags, (number >> 24) as u16 & 0xFF);
            }
            // A table of descriptors.
            4 => {
                let at = machine.buffers + u64::from(input.byte().unwrap_or(0)) * 16;
                let number = input.number();
                let (length, flags) = ((number >> 32) as u32, (number >> 20) as u16 & 7);
                write_descriptor(&machine.memory, at, machine.buffers + (number & 0xFFFFF), length, flags, (number >> 28) as u16 & 7);
            }
            // A chain is offered.
            5..=7 => {
                let head = u16::from(input.byte().unwrap_or(0));
                machine.queues[index].available_entry(offered[index], head);
                offered[index] = offered[index].wrapping_add(1);
                machine.queues[index].available_index(offered[index]);
                machine.device.on_kick(index as u16, &mut machine.events);
            }
            8 => {
                let jump = u16::from(input.byte().unwrap_or(0));
                offered[index] = offered[index].wrapping_add(jump);
                machine.queues[index].available_index(offered[index]);
                machine.device.on_kick(index as u16, &mut machine.events);
            }
            // Content of buffers.
            9 | 10 => {
                let at = machine.buffers + u64::from(input.byte().unwrap_or(0)) * 64;
                let count = usize::from(input.byte().unwrap_or(0));
                let bytes = input.bytes(count);
                machine.put(at, bytes);
            }
            11 => drop(machine.events.turn(&mut machine.device, Duration::ZERO)),
            12 => machine.device.on_pause(input.byte().unwrap_or(0) & 1 == 1, &mut machine.events),
            13 => {
                machine.reset();
                assert_eq!(machine.events.watched(), 0, "a reset device watches nothing");
                machine.activate();
                offered.fill(0);
            }
            _ => other(machine, input),
        }
    }
    machine.device.on_pause(false, &mut machine.events);
    for _ in 0..1000 {
        if machine.events.turn(&mut machine.device, Duration::ZERO) == 0 {
            return;
        }
    }
    panic!("the device never comes to rest");
}
