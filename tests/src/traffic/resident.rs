//! The process side of a resident: reads [`Command`]s, carries them out, writes [`Reply`]s. It ends when its stdin does,
//! so that it never outlives a test that was killed.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, Write as _},
    time::Duration,
};

use anyhow::Result;

use super::{
    Command, Failure, Protocol, Reply,
    bare::Bare,
    churn::{accept, churn},
    client::{Connection, Conversation, ask, transfer},
    inquiry::inquire,
    rate::Rate,
    server::serve,
    socket::bind,
    stream::Stream,
};

/// What goes on between two commands.
#[derive(Debug)]
enum Activity {
    Open(Connection),
    Talk(Conversation),
    Bare(Bare),
    Stream(Stream, Duration),
    Rate(Rate),
}

#[derive(Debug, Default)]
struct Resident {
    activities: HashMap<u64, Activity>,
    last: u64,
}

/// Serves stdin until it ends.
pub fn run() -> Result<()> {
    let mut resident = Resident::default();
    for line in io::stdin().lock().lines() {
        let reply = resident.carry_out(serde_json::from_str(&line?)?);
        let mut stdout = io::stdout().lock();
        serde_json::to_writer(&mut stdout, &reply)?;
        stdout.write_all(b"\n")?;
        stdout.flush()?;
    }
    Ok(())
}

impl Resident {
    fn carry_out(&mut self, command: Command) -> Reply {
        match command {
            Command::Serve { name, ports } => match serve(&name, &ports) {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Refused(format!("{name} cannot listen on {ports:?}: {error}")),
            },
            Command::Accept(port) => accept(port).map_or_else(|error| Reply::Failed(error.into()), |()| Reply::Done),
            Command::Churn(plan) => churn(plan).map_or_else(|error| Reply::Failed(error.into()), Reply::Churned),
            Command::Bind(target) => bind(target).map_or_else(|error| Reply::Failed(error.into()), |()| Reply::Done),
            Command::Ask(request, count) => Reply::Answers((0..count).map(|_| ask(&request)).collect()),
            Command::Inquire(inquiries) => Reply::Found(inquire(&inquiries)),
            Command::Open(request) if request.target.protocol == Protocol::Udp => {
                self.started(Conversation::open(&request).map(Activity::Talk))
            }
            Command::Open(request) => self.started(Connection::open(&request).map(Activity::Open)),
            Command::Make(kind) => self.started(Bare::new(kind).map(Activity::Bare)),
            Command::Call(number, call) => match self.activities.get_mut(&number) {
                Some(Activity::Bare(socket)) => Reply::Heard(socket.call(call)),
                _ => unknown(number),
            },
            Command::Again(number) => match self.activities.get_mut(&number) {
                Some(Activity::Open(connection)) => Reply::Answers(vec![connection.ask()]),
                Some(Activity::Talk(conversation)) => Reply::Answers(vec![conversation.ask()]),
                _ => unknown(number),
            },
            Command::Close(number) => self.activities.remove(&number).map_or_else(|| unknown(number), |_| Reply::Done),
            Command::Transfer(request, bytes) => {
                transfer(&request, bytes).map_or_else(Reply::Failed, Reply::Transferred)
            }
            Command::Stream(plan) => {
                let stream = Stream::start(plan).map_err(Failure::from);
                self.started(stream.map(|stream| Activity::Stream(stream, plan.linger)))
            }
            Command::Rate(plan) => self.started(Ok(Activity::Rate(Rate::start(plan)))),
            Command::Finish(number) => self.finish(number),
        }
    }

    fn started(&mut self, activity: Result<Activity, Failure>) -> Reply {
        match activity {
            Ok(activity) => {
                self.last += 1;
                self.activities.insert(self.last, activity);
                Reply::Started(self.last)
            }
            Err(failure) => Reply::Failed(failure),
        }
    }

    fn finish(&mut self, number: u64) -> Reply {
        match self.activities.remove(&number) {
            Some(Activity::Stream(stream, linger)) => {
                stream.finish(linger).map_or_else(|| Reply::Refused("the stream panicked".into()), Reply::Streamed)
            }
            Some(Activity::Rate(rate)) => Reply::Rated(rate.finish()),
            _ => unknown(number),
        }
    }
}

fn unknown(number: u64) -> Reply {
    Reply::Refused(format!("nothing of the kind goes on under number {number}"))
}
