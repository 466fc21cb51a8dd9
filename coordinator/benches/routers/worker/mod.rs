//! The worker: a process that is all instances at once, prefill and decode, of Baton's kind and of the kind that the other
//! routers know. It computes nothing: every answer is a function of the request's seed.
//!
//! Both kinds have one [`engine`], whose steps all sequences share. [`attach`] speaks `Inference`, [`cache`] says what the
//! instances have cached, [`http`] speaks OpenAI's API with the fields by which the routers pair two workers.

mod attach;
mod cache;
mod engine;
mod http;
mod outbox;

use std::{
    io::{self, BufRead, Write},
    sync::Arc,
};

use baton_proto::v1;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    error::BenchError,
    protocol::{Done, Listens, Pace, WorkerReady, WorkerSetup},
};
use attach::Instance;
pub(crate) use engine::{Engine, Sequence};
pub(crate) use http::Frames;

/// Runs until standard input ends.
pub(crate) fn run() -> Result<(), BenchError> {
    // One thread: what the worker and the client leave of the machine is the router's.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(BenchError::io("start a runtime"))?;
    let Some(setup) = read::<WorkerSetup>()? else { return Ok(()) };
    runtime.block_on(async {
        let words = Arc::new(setup.words);
        let engine = Arc::new(Engine::default());
        let frames = Arc::new(http::Frames::new(&words));
        let mut ready = WorkerReady { prefill: Vec::new(), decode: Vec::new() };
        for pair in 0..setup.pairs {
            for (role, listens) in
                [(v1::Role::Prefill, &mut ready.prefill), (v1::Role::Decode, &mut ready.decode)]
            {
                let name = if role == v1::Role::Prefill { "prefill" } else { "decode" };
                let id = format!("{name}-{pair}");
                let instance = Instance::new(id.clone(), role, words.clone(), engine.clone());
                let (grpc, at) = listen().await?;
                let grpc = grpc.into_std().map_err(BenchError::io("listen"))?;
                tokio::spawn(instance.serve(grpc));
                let (http, web) = listen().await?;
                tokio::spawn(http::serve(http, frames.clone(), engine.clone(), role));
                listens.push(Listens { id, grpc: at, http: web });
            }
        }
        say(&ready)?;
        serve_orders(engine).await
    })
}

/// Has the engine step, as fast as it is told to on standard input, until that ends.
pub(crate) async fn serve_orders(engine: Arc<Engine>) -> Result<(), BenchError> {
    let (paces, pace) = watch::channel(Pace { step_micros: 0 });
    tokio::spawn(engine.run(pace));
    // Lines are read on a thread of their own; the runtime's goes on stepping.
    let orders = tokio::task::spawn_blocking(move || {
        while let Some(order) = read::<Pace>()? {
            paces.send_replace(order);
            say(&Done {})?;
        }
        Ok(())
    });
    orders.await.map_err(|error| BenchError::said("the process", error.to_string()))?
}

pub(crate) async fn listen() -> Result<(TcpListener, String), BenchError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(BenchError::io("listen"))?;
    let address = listener.local_addr().map_err(BenchError::io("listen"))?;
    Ok((listener, address.to_string()))
}

/// The next line of standard input; `None` at its end.
pub(crate) fn read<T: DeserializeOwned>() -> Result<Option<T>, BenchError> {
    let mut line = String::new();
    let length = io::stdin().lock().read_line(&mut line).map_err(BenchError::io("read an order"))?;
    if length == 0 {
        return Ok(None);
    }
    let order = serde_json::from_str(&line).map_err(|error| BenchError::said("an order", error.to_string()));
    order.map(Some)
}

pub(crate) fn say(what: &impl Serialize) -> Result<(), BenchError> {
    let mut out = io::stdout().lock();
    let line = serde_json::to_string(what).unwrap_or_default();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(BenchError::io("answer an order"))
}
