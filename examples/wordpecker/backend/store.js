'use strict';
/*
 * Where lists and their words live: MongoDB when MONGODB_URI is set, else this process's memory.
 * Both stores offer the same methods. A list is { id, name, words: [{ word, meaning, box }] }; a word climbs from box 0 to
 * box 5 as it is remembered and falls back to 0 when it is not.
 * When MongoDB is configured and cannot be reached, calls fail with StoreDown: falling back to memory would lose words.
 */
const { randomUUID } = require('node:crypto');

const TOP_BOX = 5;
const MAX_LISTS = 1000;
const MAX_WORDS = 1000;
const DEADLINE_MS = 2000;
const PING_MS = 1000;
const SHOWN = { projection: { _id: 0, id: '$_id', name: 1, words: 1 } };

/** The store cannot answer now; `reason` is one of a few fixed words and never holds an address or a password. */
class StoreDown extends Error {
  constructor(reason) {
    super(`the store is down: ${reason}`);
    this.reason = reason;
  }
}

/** There is room for no more. */
class StoreFull extends Error {}

class MemoryStore {
  #lists = new Map();

  constructor() {
    const id = randomUUID();
    const words = [['pájaro', 'bird'], ['carpintero', 'woodpecker'], ['palabra', 'word'], ['árbol', 'tree']];
    this.#lists.set(id, { id, name: 'First words in Spanish', words: words.map(([word, meaning]) => ({ word, meaning, box: 0 })) });
  }

  async status() {
    return { configured: false, connected: false, status: 'not configured' };
  }

  async lists() {
    return [...this.#lists.values()].map(({ id, name, words }) => ({ id, name, words: words.length }));
  }

  async list(id) {
    return this.#lists.get(id);
  }

  async add(name) {
    if (this.#lists.size >= MAX_LISTS) throw new StoreFull(`at most ${MAX_LISTS} lists`);
    const list = { id: randomUUID(), name, words: [] };
    this.#lists.set(list.id, list);
    return list;
  }

  async remove(id) {
    return this.#lists.delete(id);
  }

  async addWord(id, word, meaning) {
    const list = this.#lists.get(id);
    if (!list) return undefined;
    if (list.words.length >= MAX_WORDS) throw new StoreFull(`at most ${MAX_WORDS} words in a list`);
    list.words = [...list.words.filter((known) => known.word !== word), { word, meaning, box: 0 }];
    return list;
  }

  async answer(id, word, correct) {
    const known = this.#lists.get(id)?.words.find((each) => each.word === word);
    if (known) known.box = correct ? Math.min(known.box + 1, TOP_BOX) : 0;
    return known;
  }

  async close() {}
}

/** The reason of a driver's error, in a fixed word: the driver's own text may hold the address with its password. */
function reasonOf(error) {
  if (error instanceof StoreDown) return error.reason;
  if (error?.code === 18 || error?.code === 13 || /auth/i.test(error?.name ?? '')) return 'authentication failed';
  if (error?.name === 'MongoOperationTimeoutError') return 'timeout';
  return 'unreachable';
}

async function within(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new StoreDown('timeout')), milliseconds);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

class MongoStore {
  #uri;
  #client;
  #broken;
  #ping;

  constructor(uri) {
    this.#uri = uri;
  }

  /** Load the driver and name the database on first use, so that nothing needs the driver where no MongoDB is configured. */
  #database() {
    if (this.#broken) throw new StoreDown(this.#broken);
    if (!this.#client) {
      let driver;
      try {
        driver = require('mongodb');
      } catch {
        this.#broken = 'driver missing';
        throw new StoreDown(this.#broken);
      }
      try {
        this.#client = new driver.MongoClient(this.#uri, {
          appName: 'wordpecker',
          maxPoolSize: 10,
          serverSelectionTimeoutMS: DEADLINE_MS,
          connectTimeoutMS: DEADLINE_MS,
          socketTimeoutMS: DEADLINE_MS,
          waitQueueTimeoutMS: DEADLINE_MS,
        });
      } catch {
        this.#broken = 'invalid address';
        throw new StoreDown(this.#broken);
      }
    }
    return this.#client.db();
  }

  async #use(work) {
    try {
      return await within(DEADLINE_MS, work(this.#database().collection('lists')));
    } catch (error) {
      throw error instanceof StoreFull ? error : new StoreDown(reasonOf(error));
    }
  }

  /** One ping at a time: many callers asking at once share it, so that a storm of readiness checks is one question. */
  async status() {
    this.#ping ??= this.#pinged().finally(() => {
      this.#ping = undefined;
    });
    return this.#ping;
  }

  async #pinged() {
    const started = performance.now();
    try {
      await within(PING_MS, this.#database().command({ ping: 1 }));
      return { configured: true, connected: true, status: 'connected', ping_ms: Math.round((performance.now() - started) * 100) / 100 };
    } catch (error) {
      return { configured: true, connected: false, status: reasonOf(error) };
    }
  }

  async lists() {
    const shape = { projection: { _id: 0, id: '$_id', name: 1, words: { $size: '$words' } } };
    return this.#use((lists) => lists.find({}, shape).limit(MAX_LISTS).toArray());
  }

  async list(id) {
    return this.#use((lists) => lists.findOne({ _id: id }, SHOWN));
  }

  async add(name) {
    return this.#use(async (lists) => {
      if ((await lists.estimatedDocumentCount()) >= MAX_LISTS) throw new StoreFull(`at most ${MAX_LISTS} lists`);
      const id = randomUUID();
      await lists.insertOne({ _id: id, name, words: [] });
      return { id, name, words: [] };
    });
  }

  async remove(id) {
    return this.#use(async (lists) => (await lists.deleteOne({ _id: id })).deletedCount === 1);
  }

  async addWord(id, word, meaning) {
    const others = { $filter: { input: '$words', cond: { $ne: ['$$this.word', { $literal: word }] } } };
    const words = { $concatArrays: [others, [{ $literal: { word, meaning, box: 0 } }]] };
    return this.#use(async (lists) => {
      const room = { _id: id, [`words.${MAX_WORDS - 1}`]: { $exists: false } };
      const { matchedCount } = await lists.updateOne(room, [{ $set: { words } }]);
      const list = await lists.findOne({ _id: id }, SHOWN);
      if (list && matchedCount === 0) throw new StoreFull(`at most ${MAX_WORDS} words in a list`);
      return list;
    });
  }

  async answer(id, word, correct) {
    return this.#use(async (lists) => {
      const climbs = { _id: id, words: { $elemMatch: { word, box: { $lt: TOP_BOX } } } };
      if (correct) await lists.updateOne(climbs, { $inc: { 'words.$.box': 1 } });
      else await lists.updateOne({ _id: id, 'words.word': word }, { $set: { 'words.$.box': 0 } });
      return (await lists.findOne({ _id: id }, SHOWN))?.words.find((each) => each.word === word);
    });
  }

  async close() {
    await this.#client?.close();
  }
}

/** The store for `uri`; memory where there is none. */
const openStore = (uri) => (uri ? new MongoStore(uri) : new MemoryStore());

module.exports = { openStore, StoreDown, StoreFull };
