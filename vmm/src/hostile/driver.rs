//! A guest whose every descriptor, ring index and buffer is made of bytes of the input, at any device.

use std::time::Duration;

use super::Input;
use crate::virtio::device::Device;
use crate::virtio::guest_driver::{Buffer, Machine, write_descriptor};

/// Most steps of one run.
const STEPS: usize = 200;
/// Most turns until a device that nobody asks anything has to be at rest.
const TURNS: usize = 1000;

impl Input<'_> {
    /// A guest address: mostly one inside memory, sometimes any.
    pub fn address(&mut self) -> u64 {
        match self.byte() {
            0 => u64::from(self.word()) << 20,
            1 => u64::MAX - u64::from(self.byte()),
            kind => u64::from(self.word() & 0xFF_FFFF) & !if kind & 1 == 0 { 0xFFF } else { 0 },
        }
    }

    /// A length of a buffer: mostly a small one.
    pub fn length(&mut self) -> u32 {
        match self.byte() {
            0 => self.word(),
            kind @ 1..=9 => u32::from(kind) * 4096,
            kind @ 10..=90 => u32::from(kind),
            _ => [1, 4, 8, 16, 20, 512][usize::from(self.byte()) % 6],
        }
    }

    fn buffers(&mut self) -> Vec<Buffer> {
        let count = usize::from(self.byte() % 6);
        let mut buffers: Vec<Buffer> = (0..count)
            .map(|_| match self.byte() & 1 {
                0 => Buffer::Readable(self.address(), self.length()),
                _ => Buffer::Writable(self.address(), self.length()),
            })
            .collect();
        if self.byte() > 10 {
            buffers.sort_by_key(|buffer| matches!(buffer, Buffer::Writable(..)));
        }
        buffers
    }
}

/// Drives the device as `input` says; `special` does what only this kind of device knows.
pub fn drive<D: Device>(
    machine: &mut Machine<D>,
    input: &mut Input<'_>,
    mut special: impl FnMut(&mut Machine<D>, &mut Input<'_>),
) {
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let step = input.byte();
        let count = machine.queues.len();
        let queue = usize::from(input.byte()) % count;
        let index = queue as u16;
        match step % 12 {
            0..=2 => {
                let buffers = input.buffers();
                if machine.queues[queue].post(&buffers).is_none() {
                    machine.queues[queue].forget();
                }
            }
            3 => {
                let (table, buffers) = (machine.buffers + 4096 * u64::from(input.byte()), input.buffers());
                machine.queues[queue].post_indirect(table, &buffers);
            }
            4 => {
                let (address, length) = (input.address(), input.length());
                let (flags, next) = (u16::from(input.byte() & 7), input.byte().into());
                let place = input.byte();
                match place & 0xC0 {
                    // Into a table that an indirect descriptor may name.
                    0xC0 => {
                        let at =
                            machine.buffers + 4096 * u64::from(place & 3) + 16 * u64::from(place >> 2 & 7);
                        write_descriptor(&machine.memory, at, address, length, flags, next);
                    }
                    _ => {
                        machine.queues[queue].descriptor(u16::from(place) % 64, address, length, flags, next)
                    }
                }
            }
            5 => machine.queues[queue].available_index(input.short()),
            6 => machine.queues[queue].available_entry(input.byte().into(), input.short()),
            7 => {
                let at = machine.buffers + u64::from(input.word() & 0xF_FFFF);
                let count = input.byte();
                machine.put(at, input.bytes(count.into()));
            }
            8 => {
                machine.events.turn(&mut machine.device, Duration::ZERO);
            }
            9 => match input.byte() % 4 {
                0 => {
                    machine.reset();
                    assert_eq!(machine.events.watched(), 0, "a device that was reset watches something");
                    machine.activate();
                }
                paused => machine.device.on_pause(paused == 1, &mut machine.events),
            },
            10 => {
                let bytes = input.word().to_le_bytes();
                machine.device.config().write(input.byte().into(), &bytes);
            }
            _ => special(machine, input),
        }
        machine.device.on_kick(index, &mut machine.events);
    }
    machine.device.on_pause(false, &mut machine.events);
    let mut turns = 0..TURNS;
    while machine.events.turn(&mut machine.device, Duration::ZERO) > 0 {
        assert!(turns.next().is_some(), "the device never comes to rest");
    }
    machine.reset();
    assert_eq!(machine.events.watched(), 0, "a device that was reset watches something");
}
