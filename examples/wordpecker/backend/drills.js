'use strict';
/*
 * Ways to misbehave on request, so that monitoring and healing can be seen to work. Only when started with WORDPECKER_DRILL=1.
 * In cluster mode a drill strikes the one worker that takes the request.
 */
const { Worker } = require('node:worker_threads');

const MIB = 1024 * 1024;

/** A parameter of a drill is wrong; the text names it. */
class BadParameter extends Error {}

function number(query, name, { normal, max }) {
  const text = query.get(name);
  if (text === null) return normal;
  const value = Number(text);
  if (text.trim() === '' || !(value >= 0 && value <= max)) throw new BadParameter(`${name} must be a number from 0 to ${max}`);
  return value;
}

class Drills {
  unhealthy = false;
  latencyMs = 0;
  #leaked = [];
  #leaking;
  #burning = new Set();

  /**
   * What each drill does, by name. Each takes the query and returns { told, after }: what the caller is told, and what happens
   * once that answer has left, for a crashed process answers nobody.
   */
  #all = {
    crash: () => ({ told: {}, after: () => { throw new Error('drill: crash'); } }),
    // Plain Node dies of it; PM2 puts a listener of its own into the app, so that there it is only logged and told on the bus.
    reject: () => ({ told: {}, after: () => { Promise.reject(new Error('drill: unhandled rejection')); } }),
    exit: (query) => {
      const code = Math.trunc(number(query, 'code', { normal: 1, max: 255 }));
      return { told: { code }, after: () => process.exit(code) };
    },
    hang: (query) => {
      const seconds = number(query, 'seconds', { normal: Infinity, max: 86400 });
      const cell = new Int32Array(new SharedArrayBuffer(4));
      return { told: { seconds: seconds === Infinity ? 'forever' : seconds }, after: () => Atomics.wait(cell, 0, 0, seconds * 1000) };
    },
    leak: (query) => {
      const mb = number(query, 'mb', { normal: 10, max: 1024 });
      const upto = number(query, 'upto', { normal: 1024, max: 65536 });
      return {
        told: { mb_per_second: mb, upto_mb: upto },
        after: () => {
          let total = 0;
          const grow = () => {
            if (total + mb > upto) return clearInterval(this.#leaking);
            total += mb;
            this.#leaked.push(Buffer.alloc(Math.round(mb * MIB), 1)); // filled, so that the pages are resident
          };
          clearInterval(this.#leaking);
          this.#leaking = setInterval(grow, 1000);
          grow();
        },
      };
    },
    burn: (query) => {
      const seconds = number(query, 'seconds', { normal: 10, max: 3600 });
      const threads = Math.trunc(number(query, 'threads', { normal: 1, max: 64 }));
      const burn = `const until = performance.now() + ${seconds * 1000}; while (performance.now() < until);`;
      return {
        told: { seconds, threads },
        after: () => {
          for (let i = 0; i < threads; i += 1) {
            const worker = new Worker(burn, { eval: true }); // a thread of its own: the CPU burns and the event loop still answers
            this.#burning.add(worker);
            worker.once('exit', () => this.#burning.delete(worker));
          }
        },
      };
    },
    unhealthy: () => ({ told: { until: 'restart or POST /drill/recover' }, after: () => { this.unhealthy = true; } }),
    slow: (query) => {
      const ms = number(query, 'ms', { normal: 2000, max: 600000 });
      return { told: { ms }, after: () => { this.latencyMs = ms; } };
    },
    'fill-log': (query) => {
      const mb = number(query, 'mb', { normal: 10, max: 10240 });
      return { told: { mb }, after: () => this.#fillLog(mb) };
    },
    recover: () => ({ told: {}, after: () => this.#recover() }),
  };

  /** The names of all drills. */
  get names() {
    return Object.keys(this.#all);
  }

  /** Prepare drill `name`; undefined where there is none of that name, BadParameter where the query is wrong. */
  prepare(name, query) {
    const drill = Object.hasOwn(this.#all, name) ? this.#all[name](query) : undefined;
    return drill && { told: { drill: name, pid: process.pid, ...drill.told }, after: drill.after };
  }

  async #fillLog(mb) {
    const line = `drill: filling the log ${'x'.repeat(1000)}\n`;
    const block = line.repeat(Math.floor(MIB / line.length));
    for (let left = mb * MIB; left > 0; left -= block.length) {
      const part = left < block.length ? block.slice(0, Math.max(0, Math.floor(left) - 1)) + '\n' : block;
      await new Promise((written) => process.stdout.write(part, written)); // one block at a time: a slow reader is waited for
    }
  }

  #recover() {
    this.unhealthy = false;
    this.latencyMs = 0;
    clearInterval(this.#leaking);
    this.#leaked = [];
    for (const worker of this.#burning) worker.terminate();
  }
}

module.exports = { Drills, BadParameter };
