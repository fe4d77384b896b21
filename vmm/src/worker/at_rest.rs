//! The VM at rest: pause and resume, and what is done between them: snapshot and fork.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use blixard_vmm_api::ExitReason;
use blixard_vmm_api::control::{Phase, Reply};
use blixard_vmm_api::snapshot::{SnapshotKind, SnapshotMade};

use super::Machine;
use crate::control::Answered;
use crate::devices::generation;
use crate::flight::{self, What};
use crate::mailbox::Message;
use crate::memory::pages::Pages;
use crate::memory::ram::{RamError, Written};
use crate::memory::{self, sparse};
use crate::poll::{DeviceWatch, Poll};
use crate::snapshot::codec::Writer;
use crate::snapshot::file::StateWriter;
use crate::snapshot::save::{self, SaveError};
use crate::snapshot::{Id, sections};
use crate::times::now_us;

impl Machine {
    /// Stops vCPUs, then devices. After it nothing of the VM changes any more.
    pub(super) fn pause(&mut self, poll: &mut Poll) {
        if self.phase == Phase::Paused {
            return;
        }
        self.vcpus.pause();
        self.take_messages(poll);
        self.tell_devices(true, poll);
        self.set_phase(Phase::Paused);
    }

    /// Lets devices and vCPUs go on.
    pub(super) fn resume(&mut self, poll: &mut Poll) {
        if self.phase == Phase::Running {
            return;
        }
        self.set_phase(Phase::Running);
        self.tell_devices(false, poll);
        self.vcpus.resume();
    }

    /// Lets a VM that was restored go on, or leaves it paused.
    pub(super) fn wake(&mut self, poll: &mut Poll, paused: bool) {
        if paused {
            self.tell_devices(true, poll);
        }
        // Devices that were active are activated.
        self.take_messages(poll);
        if let Err(error) = generation::renew(self.ram.memory()) {
            self.exit.get_or_insert(ExitReason::HostProblem { detail: crate::chain(&error) });
            return;
        }
        generation::announce(&self.bus.ioapic);
        self.slots.iter().for_each(|slot| slot.transport.wake_driver());
        if let Some(tell) = &self.tell_restored {
            tell();
        }
        if paused {
            self.set_phase(Phase::Paused);
        } else {
            self.vcpus.resume();
        }
    }

    /// Does what vCPUs asked for before they stopped.
    fn take_messages(&mut self, poll: &mut Poll) {
        let mut printed = false;
        loop {
            let messages = self.bus.mailbox.take();
            if messages.is_empty() {
                break;
            }
            for message in messages {
                if message == Message::Serial {
                    printed = true;
                } else {
                    self.on_message(message, poll);
                }
            }
        }
        if printed {
            // That is the console's.
            self.bus.mailbox.post(Message::Serial);
        }
    }

    fn tell_devices(&mut self, paused: bool, poll: &mut Poll) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            slot.device.on_pause(paused, &mut DeviceWatch { poll, device: index });
        }
    }

    fn set_phase(&mut self, phase: Phase) {
        if self.phase != phase {
            flight::note(What::Vm, if phase == Phase::Paused { "paused" } else { "running" });
        }
        self.changed |= self.phase != phase;
        self.phase = phase;
    }

    pub(super) fn snapshot(&mut self, kind: SnapshotKind, given: Vec<OwnedFd>, poll: &mut Poll) -> Answered {
        let made = self.resting(poll, |machine| machine.write_snapshot(kind, given));
        match made {
            Ok(made) => (Reply::Snapshot(made), vec![]),
            Err(error) => refused(&error),
        }
    }

    pub(super) fn fork(&mut self, poll: &mut Poll) -> Answered {
        let mut files = vec![];
        match self.resting(poll, |machine| machine.write_fork(&mut files)) {
            Ok(made) => (Reply::Forked(made), files),
            Err(error) => {
                if let SaveError::Ram(RamError::Freeze { .. }) = error {
                    // Part of memory may be frozen and part not: nothing can be said of it any more.
                    let detail = crate::chain(&error);
                    self.exit.get_or_insert(ExitReason::Internal { detail });
                }
                refused(&error)
            }
        }
    }

    /// Does something to the VM at rest, which goes on when it did so before.
    fn resting(
        &mut self,
        poll: &mut Poll,
        act: impl FnOnce(&mut Self) -> Result<SnapshotMade, SaveError>,
    ) -> Result<SnapshotMade, SaveError> {
        let was_running = self.phase == Phase::Running;
        let start = now_us();
        self.pause(poll);
        let made = act(self);
        if was_running {
            self.resume(poll);
        }
        let pause_us = was_running.then(|| now_us().saturating_sub(start));
        made.map(|made| SnapshotMade { pause_us, ..made })
    }

    fn write_snapshot(&mut self, kind: SnapshotKind, given: Vec<OwnedFd>) -> Result<SnapshotMade, SaveError> {
        let files = <[OwnedFd; 2]>::try_from(given);
        let [state, memory] = files
            .map_err(|_| SaveError::Descriptors("two descriptors are needed: state file, memory file"))?
            .map(File::from);
        if !save::is_regular(&state) || !save::is_regular(&memory) {
            return Err(SaveError::Descriptors("state and memory have to be regular files"));
        }
        let id = Id::random().map_err(system("random bytes"))?;
        let vcpus = self.vcpus.save(self.kvm.host_state()?)?;
        let written = match kind {
            SnapshotKind::Full => self.ram.write_full(&self.kvm, &memory, id)?,
            SnapshotKind::Diff => self.ram.write_diff(&self.kvm, &memory, id)?,
        };
        let state_bytes = self.write_state(&vcpus, id, &written, &state)?;
        Ok(made(id, &written, state_bytes))
    }

    fn write_fork(&mut self, files: &mut Vec<Arc<File>>) -> Result<SnapshotMade, SaveError> {
        let id = Id::random().map_err(system("random bytes"))?;
        let vcpus = self.vcpus.save(self.kvm.host_state()?)?;
        let state =
            memory::memfd(c"fork-state", libc::MFD_ALLOW_SEALING).map_err(system("file in memory"))?;
        let state = Arc::new(state);
        let frozen = self.ram.freeze(&self.kvm, &state, id)?;
        let state_bytes = self.write_state(&vcpus, id, &frozen.written, &state)?;
        // Children get this very file: none of them shall change it for the others.
        memory::seal(&state).map_err(system("seal the state file"))?;
        files.extend([state, frozen.memory]);
        files.extend(frozen.base.into_iter().flat_map(|base| [base.state, base.memory]));
        Ok(made(id, &frozen.written, state_bytes))
    }

    fn write_state(
        &self,
        vcpus: &[crate::arch::x86_64::vcpu_state::VcpuState],
        id: Id,
        written: &Written,
        file: &File,
    ) -> Result<u64, SaveError> {
        let parts = save::Parts {
            vm: &self.kvm,
            template: &self.template,
            vcpus,
            bus: &self.bus,
            slots: &self.slots,
            memory: sparse::size(self.ram.memory()),
            guest_ready: self.guest.with(|news| news.ready),
        };
        parts.write(id, written, file)
    }

    pub(super) fn working_set(&mut self, given: Vec<OwnedFd>) -> Answered {
        match self.write_working_set(given) {
            Ok(()) => (Reply::Done, vec![]),
            Err(error) => refused(&error),
        }
    }

    fn write_working_set(&self, given: Vec<OwnedFd>) -> Result<(), SaveError> {
        let Some(used) = &self.used else {
            return Err(SaveError::Descriptors("the VM was not restored with paging by userfault"));
        };
        let [file] = <[OwnedFd; 1]>::try_from(given)
            .map_err(|_| SaveError::Descriptors("one descriptor is needed: the working set file"))?
            .map(File::from);
        if !save::is_regular(&file) {
            return Err(SaveError::Descriptors("the working set has to be a regular file"));
        }
        let mut pages = Pages::new(sparse::size(self.ram.memory()) / 4096);
        used.copy_into(pages.words_from(0));
        let mut state = StateWriter::default();
        let mut fields = Writer::new();
        sections::save_extents(&pages.extents(), &mut fields);
        state.add("working-set", fields);
        state.write_to(&file)?;
        Ok(())
    }
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> SaveError {
    move |source| SaveError::System { what, source }
}

fn refused(error: &SaveError) -> Answered {
    (Reply::Refused { reason: crate::chain(error) }, vec![])
}

fn made(id: Id, written: &Written, state_bytes: u64) -> SnapshotMade {
    SnapshotMade {
        id: id.to_string(),
        parent: written.parent.map(|parent| parent.to_string()),
        memory_bytes: written.bytes,
        state_bytes,
        pause_us: None,
    }
}
